"""Constraints by themselves and in the sampler: every completion is an entry, or a walk."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError, RolloutError
from posttrain_lib.evaluation.generation import next_logits
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.rl.constraints import State, StateMachine, Trie
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from tests.oracles.tiny_job import write_model
from tests.support.engines import drained, loaded, request

END = 63
CATALOGUES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    model, spec = loaded(write_model(tmp_path_factory.mktemp("constraints") / "model"))
    return EmbeddedEngine(model, spec, window=64, slots=5)


@given(CATALOGUES)
def test_a_trie_allows_what_some_entry_goes_on_with(catalogue: list[tuple[int, ...]]) -> None:
    trie = pickle.loads(pickle.dumps(Trie(catalogue, END)))
    whole = {(*entry, END) for entry in catalogue}
    for beginning in {entry[:length] for entry in whole for length in range(len(entry))}:
        following = {entry[len(beginning)] for entry in whole if entry[: len(beginning)] == beginning}
        assert trie.after(beginning).tolist() == sorted(following)
    for entry in whole:
        assert trie.after(entry).tolist() == []
        wrong = (*entry[:-1], 9)
        with pytest.raises(RolloutError, match="no entry"):
            trie.after(wrong)


@given(CATALOGUES)
def test_every_completion_is_an_entry(engine: EmbeddedEngine, catalogue: list[tuple[int, ...]]) -> None:
    """Also beside requests without a constraint, and greedily."""
    trie = Trie(catalogue, END)
    requests = [
        request(str(n), [n], 20, seed=n, allowed=trie, stop_ids=frozenset({END}), temperature=float(n % 3))
        for n in range(6)
    ]
    found = drained(engine, [*requests, request("free", [1], 3), request("long", [1], 6)])
    for n in range(6):
        assert found[str(n)].finish == "stop"
        assert tuple(found[str(n)].token_ids.tolist()) in {(*entry, END) for entry in catalogue}


def test_every_completion_is_a_walk(engine: EmbeddedEngine) -> None:
    """A tag opens, holds anything but what closes it, closes, and the text ends; or ends inside, where all may come."""
    states = {
        "start": State({1: "inside"}),
        "inside": State({2: "closed"}, otherwise="inside"),
        "closed": State({END: "end"}),
        "end": State(),
    }
    machine, stop = StateMachine(states, "start"), frozenset({END})
    requests = [request(str(n), [n], 60, seed=n, allowed=machine, stop_ids=stop, temperature=3.0) for n in range(40)]
    stopped = [each.token_ids.tolist() for each in drained(engine, requests).values() if each.finish == "stop"]
    closed = [tokens for tokens in stopped if 2 in tokens]
    assert len(closed) > 5 and len(stopped) > len(closed)
    for tokens in stopped:
        assert tokens[0] == 1 and tokens.index(END) == len(tokens) - 1
        assert 2 not in tokens or tokens.index(2) == len(tokens) - 2


def test_log_probabilities_are_among_the_allowed(tmp_path: Path) -> None:
    model, spec = loaded(write_model(tmp_path / "model"))
    engine = EmbeddedEngine(model, spec, window=64, slots=1)
    completion = drained(engine, [request("a", [4, 5], allowed=Trie([[3], [7]], END), temperature=0.5, new_tokens=1)])[
        "a"
    ]
    with torch.no_grad():
        logits = next_logits(model, [[4, 5]], KeyValueCache(1, 2))[0]
    expected = dict(zip((3, 7), (logits[[3, 7]] / 0.5).log_softmax(-1).tolist(), strict=True))
    # float32 of a float64
    assert completion.logprobs[0] == pytest.approx(expected[int(completion.token_ids[0])], rel=1e-6)


def test_a_constraint_at_its_end_names_the_request_and_harms_no_other(engine: EmbeddedEngine) -> None:
    """The end is no stop token: nothing can follow it."""
    engine.submit([request("bad", [1], allowed=Trie([[3]], END)), request("good", [1], 4)])
    engine.step()
    engine.step()
    for _ in range(2):
        with pytest.raises(RolloutError, match=r"request bad, behind 2 sampled tokens \[3, 63\]"):
            engine.step()
    aborted = engine.abort(["bad"])
    assert aborted[0].token_ids.tolist() == [3, END]
    found = drained(engine)
    assert list(found) == ["good"] and len(found["good"].token_ids) == 4


def test_ids_that_no_token_has_are_refused_at_once(engine: EmbeddedEngine) -> None:
    with pytest.raises(RolloutError, match="a token that the model does not have"):
        engine.submit([request("a", [1], allowed=Trie([[3], [64]], END))])
    assert engine.unfinished == 0


@dataclass
class Fixed:
    """Allows the same whatever was sampled."""

    ids: Any

    def after(self, sampled: Sequence[int]) -> Any:
        return self.ids


@pytest.mark.parametrize(
    "ids",
    [
        np.array([5, -1, 7]),
        np.array([5, 64, 7]),
        np.array([5, 5, 7]),
        np.array([7, 5]),
        np.array([[5, 7]]),
        np.array([5.0, 7.0]),
        np.arange(64) == 5,
        [5, 7],
    ],
    ids=repr,
)
def test_what_are_no_ascending_ids_is_refused_at_once(engine: EmbeddedEngine, ids: Any) -> None:
    """One below 0 between others would allow the last token of the vocabulary."""
    with pytest.raises(RolloutError, match="not ascending ids"):
        engine.submit([request("a", [1], allowed=Fixed(ids))])
    assert engine.unfinished == 0


def test_a_large_catalogue_is_arrays() -> None:
    """200,000 entries of four tokens: built at once, and a step looks at one node's children."""
    entries = np.random.default_rng(0).integers(0, 256, (200_000, 4))
    trie = Trie(entries.tolist(), 256)
    entry = entries[123].tolist()
    assert trie.after([]).tolist() == list(range(256))
    assert entry[3] in trie.after(entry[:3]).tolist() and trie.after(entry).tolist() == [256]


def test_what_can_be_no_constraint_is_refused() -> None:
    with pytest.raises(ConfigError, match="the catalogue is empty"):
        Trie([], END)
    for wrong in ([], [-1], [3, END]):
        with pytest.raises(ConfigError, match="entry 1"):
            Trie([[1], wrong], END)
    with pytest.raises(ConfigError, match="one that does not exist"):
        StateMachine({"a": State({1: "b"})}, "a")
    with pytest.raises(ConfigError, match="first state"):
        StateMachine({"a": State()}, "b")
    with pytest.raises(RolloutError, match="token 1, state a"):
        StateMachine({"a": State({1: "a"})}, "a").after([1, 2])
