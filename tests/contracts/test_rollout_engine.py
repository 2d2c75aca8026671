"""What every rollout engine promises (``rl.roles.RolloutRole``), on the same small model, whatever it is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="run files are read by pydantic, which is not installed here")

from posttrain_lib.adapters import vllm_process
from posttrain_lib.errors import RolloutError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.rl.constraints import Trie
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.engine.weights import hf_weights, take_weights
from posttrain_lib.rl.roles import RolloutRole, Weights
from posttrain_lib.rl.sync_guard import SyncGuard, digest_of
from posttrain_lib.schema.rollouts import Request
from tests.oracles.tiny_job import write_model
from tests.support.engines import drained, embedded, loaded, request
from tests.support.table_roles import Table, TableEngine

WINDOW, VOCABULARY = 64, 70
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9], [40, 41, 42, 43], [9, 9], [63, 0, 63]]


class Trainer(Protocol):
    """A model outside the engine."""

    def weights(self) -> Weights:
        """What is pushed."""

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of a whole sequence: float64 [T, V]."""

    def holding(self, weights: Weights) -> Trainer:
        """Another one with these weights."""


@dataclass
class DecoderTrainer:
    """Our own definition, in float32."""

    model: Decoder
    spec: ModelSpec

    def weights(self) -> Weights:
        return hf_weights(self.model, self.spec)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        length = len(tokens)
        with torch.no_grad():
            boundaries = torch.tensor([0, length], dtype=torch.int32)
            return self.model(torch.tensor(tokens), torch.arange(length), boundaries, length).double()

    def holding(self, weights: Weights) -> DecoderTrainer:
        other = build_model(self.spec)
        take_weights(other, self.spec, weights)
        return DecoderTrainer(other, self.spec)


@dataclass
class Subject:
    """An engine, the trainer with the same weights, and how near their log-probabilities are."""

    engine: RolloutRole
    trainer: Trainer
    bound: float


def text_of(tokens: Sequence[int]) -> str:
    """Each token is a letter or a sign, so that a string of two stands for two tokens."""
    return "".join(chr(48 + token) for token in tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as wide as vLLM's attention on a CPU has them; a vocabulary that every engine pads; as many positions as
    the window."""
    return write_model(
        tmp_path_factory.mktemp("rollout") / "model", head_dim=32, vocab_size=VOCABULARY, max_position_embeddings=WINDOW
    )


#: largest difference of a log-probability from the trainer's forward over whole sequences, all in float32: measured
#: 1e-6, for each engine, over more than 800 tokens of this model, whose log-probabilities are around -4
BOUND = 1e-5


def vllm_engine(folder: Path, **options: Any) -> RolloutRole:
    """On a CPU, in float32."""
    from posttrain_lib.adapters.vllm_engine import VllmEngine

    return VllmEngine(
        folder,
        options={"dtype": "float32", "enforce_eager": True, "block_size": 32},
        environment={"OMP_NUM_THREADS": "1"},
        start_seconds=300,
        call_seconds=100,
        **options,
    )


def on_cuda(folder: Path, **options: Any) -> RolloutRole:
    """The embedded engine on a CUDA device, in float32."""
    host, spec = loaded(folder, torch.float32, pad_to=64)
    model = build_model(spec, device=torch.device("cuda"))
    model.load_state_dict(host.state_dict())
    return EmbeddedEngine(model, spec, **options)


VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]


CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(
    scope="module",
    params=["fake", "embedded", pytest.param("embedded, CUDA", marks=CUDA), pytest.param("vllm", marks=VLLM)],
)
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    options: dict[str, Any] = {"window": WINDOW, "slots": 3, "decode": text_of}
    trainer: Trainer = DecoderTrainer(*loaded(folder, torch.float32))
    if request.param == "fake":
        trainer = Table.random(VOCABULARY)
        engine: RolloutRole = TableEngine(trainer, **options)
    elif request.param == "embedded":
        engine = embedded(folder, torch.float32, pad_to=64, **options)
    elif request.param == "embedded, CUDA":
        engine = on_cuda(folder, **options)
    else:
        engine = vllm_engine(folder, **options)
    yield Subject(engine, trainer, BOUND)
    engine.close()


@pytest.fixture
def engine(subject: Subject) -> RolloutRole:
    """An engine with the folder's weights and nothing to do."""
    subject.engine.abort()
    subject.engine.push(subject.trainer.weights(), 0)
    return subject.engine


def changed(trainer: Trainer, size: float = 0.3) -> list[tuple[str, torch.Tensor]]:
    """Weights after an update that nobody can overlook."""
    return [(name, value + size * torch.randn(value.shape)) for name, value in trainer.weights()]


def said_by(trainer: Trainer, tokens: Sequence[int], begin: int, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of the tokens from ``begin`` on."""
    table = (trainer.logits(tokens) / temperature).log_softmax(-1)
    return np.array([float(table[place - 1, tokens[place]]) for place in range(begin, len(tokens))])


def greedy(trainer: Trainer, prompt: Sequence[int], count: int) -> list[int]:
    """So many tokens, each the likeliest."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(trainer.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def group(**options: object) -> list[Request]:
    return [request(str(n), prompt, 12, seed=n, **options) for n, prompt in enumerate(PROMPTS)]


def test_greedy_is_the_trainers_and_the_same_again(engine: RolloutRole, subject: Subject) -> None:
    expected = [greedy(subject.trainer, prompt, 12) for prompt in PROMPTS]
    for _ in range(2):
        found = drained(engine, group(temperature=0.0))
        assert [found[str(n)].token_ids.tolist() for n in range(len(PROMPTS))] == expected
        assert {each.finish for each in found.values()} == {"length"}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_trainers(engine: RolloutRole, subject: Subject, temperature: float) -> None:
    """Those of the sampled tokens at the request's temperature; and those of given sequences at temperature 1."""
    found = drained(engine, group(temperature=temperature))
    for n, prompt in enumerate(PROMPTS):
        whole = [*prompt, *found[str(n)].token_ids.tolist()]
        expected = said_by(subject.trainer, whole, len(prompt), temperature)
        assert np.abs(found[str(n)].logprobs - expected).max() < subject.bound
        assert found[str(n)].logprobs.dtype == np.float32
        scored = engine.logprobs([whole], [len(prompt)])[0]
        assert np.abs(scored - said_by(subject.trainer, whole, len(prompt))).max() < subject.bound


def test_a_sequence_as_long_as_the_window_is_scored(engine: RolloutRole, subject: Subject) -> None:
    """Beside requests on their way, which lose nothing by it."""
    expected = drained(engine, group())
    engine.submit(group())
    engine.step()
    sequences = [[n % VOCABULARY for n in range(WINDOW)], [5, 6]]
    for found, own, begin in zip(engine.logprobs(sequences, [1, 2]), sequences, (1, 2), strict=True):
        assert len(found) == len(own) - begin
        assert np.abs(found - said_by(subject.trainer, own, begin)).max(initial=0.0) < subject.bound
    after = drained(engine)
    assert all(after[key].token_ids.tolist() == expected[key].token_ids.tolist() for key in expected)


def test_a_seed_says_what_is_drawn_whatever_runs_beside(engine: RolloutRole) -> None:
    together = drained(engine, group())
    alone = {key: completion for each in reversed(group()) for key, completion in drained(engine, [each]).items()}
    for key, completion in together.items():
        assert completion.token_ids.tolist() == alone[key].token_ids.tolist()
    others = drained(engine, [request(str(n), [9, 9], 12, seed=n) for n in range(20)])
    assert len({tuple(each.token_ids.tolist()) for each in others.values()}) > 15


def test_stop_ids_end_a_completion_and_belong_to_it(engine: RolloutRole) -> None:
    found = drained(engine, [request(str(n), [n], 30, seed=n, stop_ids=frozenset(range(8))) for n in range(30)])
    stopped = [each for each in found.values() if each.finish == "stop"]
    assert len(stopped) > 20
    for each in stopped:
        assert each.token_ids[-1] < 8 and all(each.token_ids[:-1] >= 8)
        assert len(each.token_ids) == len(each.logprobs) == len(each.versions)


def test_stop_strings_end_a_completion_over_two_tokens(engine: RolloutRole) -> None:
    free = drained(engine, [request("a", [3], 30, seed=1)])["a"].token_ids.tolist()
    string = text_of(free[10:12])
    first = text_of(free).index(string)
    found = drained(engine, [request("a", [3], 30, seed=1, stop_strings=(string, "never there"))])["a"]
    assert found.finish == "stop" and found.token_ids.tolist() == free[: first + 2]


def test_a_padded_id_is_never_sampled(engine: RolloutRole) -> None:
    """Hot enough that every token of the vocabulary comes."""
    found = drained(engine, [request(str(n), [n], 40, seed=n, temperature=2.0) for n in range(60)])
    ids = {token for each in found.values() for token in each.token_ids.tolist()}
    assert ids == set(range(VOCABULARY))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_every_constrained_completion_is_in_the_catalogue(
    engine: RolloutRole, subject: Subject, temperature: float
) -> None:
    """Beside free requests; log-probabilities are among the allowed."""
    catalogue = [(1, 2, 3), (1, 2), (1, 5, 6, 7), (40,), (41, 2)]
    trie, stop = Trie(catalogue, 69), frozenset({69})
    bound = [
        request(str(n), [n, 3], 9, seed=n, allowed=trie, stop_ids=stop, temperature=temperature) for n in range(12)
    ]
    found = drained(engine, [*bound, *(request(f"free {n}", [n], 5) for n in range(3))])
    for each in bound:
        completion = found[each.key]
        tokens = completion.token_ids.tolist()
        assert completion.finish == "stop" and tuple(tokens[:-1]) in catalogue and tokens[-1] == 69
        logits = subject.trainer.logits([*each.prompt_ids, *tokens])[1:-1] / (temperature or 1.0)
        expected = [
            float(row[trie.after(tokens[:place])].log_softmax(-1)[trie.after(tokens[:place]).tolist().index(token)])
            for place, (row, token) in enumerate(zip(logits, tokens, strict=True))
        ]
        assert np.abs(completion.logprobs - expected).max() < subject.bound


def test_a_constraint_at_its_end_names_the_request_and_harms_no_other(engine: RolloutRole) -> None:
    """The end is no stop token: nothing can follow it."""
    expected = drained(engine, [request("good", [1], 6)])["good"].token_ids.tolist()
    engine.submit([request("bad", [1], allowed=Trie([[3]], 69)), request("good", [1], 6)])
    with pytest.raises(RolloutError, match=r"request bad, behind 2 sampled tokens \[3, 69\]"):
        for _ in range(3):
            engine.step()
    with pytest.raises(RolloutError, match="request bad"):
        engine.step()
    assert [each.token_ids.tolist() for each in engine.abort(["bad"])] == [[3, 69]]
    found = drained(engine)
    assert list(found) == ["good"] and found["good"].token_ids.tolist() == expected


def test_a_request_has_nothing_of_one_that_was_aborted(engine: RolloutRole) -> None:
    """Which had its key, and came to its constraint's end while something was scored."""
    expected = drained(engine, [request("a", [1], 6)])["a"].token_ids.tolist()
    engine.submit([request("a", [1], 6, allowed=Trie([[3]], 69))])
    engine.step()
    engine.step()
    engine.logprobs([[1, 2, 3]], [1])
    assert [each.token_ids.tolist() for each in engine.abort(["a"])] == [[3, 69]]
    assert drained(engine, [request("a", [1], 6)])["a"].token_ids.tolist() == expected


def test_the_window_ends_a_completion(engine: RolloutRole) -> None:
    found = drained(engine, [request("a", [1] * (WINDOW - 5), 30), request("b", [1] * (WINDOW - 1), 30)])
    assert (len(found["a"].token_ids), found["a"].finish) == (5, "length")
    assert (len(found["b"].token_ids), found["b"].finish) == (1, "length")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("long", [1] * WINDOW), "no room"),
        (request("empty", []), "cannot read"),
        (request("strange", [1, VOCABULARY]), "cannot read"),
        (request("cold", [1], temperature=-1.0), "sampled"),
        (request("none", [1], 0), "sampled"),
        (request("good", [1]), "in the engine already"),
    ],
    ids=lambda value: value.key if isinstance(value, Request) else "",
)
def test_bad_requests_are_named_and_none_is_taken(engine: RolloutRole, wrong: Request, message: str) -> None:
    with pytest.raises(RolloutError, match=message) as error:
        engine.submit([request("good", [1]), wrong])
    assert error.value.where is not None and wrong.key in error.value.where
    assert engine.unfinished == 0 and engine.step() == []


def test_abort_gives_what_there_is(engine: RolloutRole) -> None:
    """Running ones with their tokens, waiting ones with none; the others go on as if nothing had been."""
    expected = drained(engine, group())
    engine.submit(group())
    for _ in range(4):
        assert engine.step() == []
    aborted = {each.key: each for each in engine.abort(["1", "5", "no such key"])}
    assert sorted(aborted) == ["1", "5"] and {each.finish for each in aborted.values()} == {"aborted"}
    for key, each in aborted.items():
        assert each.token_ids.tolist() == expected[key].token_ids.tolist()[: len(each.token_ids)]
        assert len(each.token_ids) == len(each.logprobs) == len(each.versions) < 12
    assert engine.unfinished == 4
    rest = drained(engine)
    assert {key: each.token_ids.tolist() for key, each in rest.items()} == {
        key: expected[key].token_ids.tolist() for key in ("0", "2", "3", "4")
    }
    engine.submit(group())
    engine.step()
    assert len(engine.abort()) == len(PROMPTS) and engine.unfinished == 0 and engine.abort() == []


def test_a_push_is_seen_at_once_and_stamped(engine: RolloutRole, subject: Subject) -> None:
    """In every layer and in the tied head. Old keys in a prefix cache would be seen too: the prompts are those of
    before, and one is longer than a block."""
    trainer = subject.trainer
    requests = [*group(), request("long", [n % 7 for n in range(50)], 12)]
    before = drained(engine, requests)
    weights = changed(trainer)
    assert engine.push(weights, 7) == digest_of(weights) and engine.version == 7
    after = drained(engine, requests)
    other = trainer.holding(weights)
    for each in requests:
        for completion, model, version in ((before[each.key], trainer, 0), (after[each.key], other, 7)):
            assert set(completion.versions.tolist()) == {version}
            whole = [*each.prompt_ids, *completion.token_ids.tolist()]
            wanted = said_by(model, whole, len(each.prompt_ids))
            assert np.abs(completion.logprobs - wanted).max() < subject.bound
    engine.push(trainer.weights(), 8)
    again = drained(engine, requests)
    assert all(before[key].token_ids.tolist() == again[key].token_ids.tolist() for key in before)


def test_a_push_meets_requests_on_their_way(engine: RolloutRole, subject: Subject) -> None:
    """They keep their tokens, go on, and each token says which weights it came from."""
    before = drained(engine, group(temperature=0.0))
    engine.submit(group(temperature=0.0))
    for _ in range(5):
        engine.step()
    engine.push(changed(subject.trainer), 1)
    found = drained(engine)
    assert {each.finish for each in found.values()} == {"length"}
    mixed = 0
    for key, each in found.items():
        versions = each.versions.tolist()
        assert len(versions) == 12 and versions == sorted(versions)
        old = versions.count(0)
        mixed += 0 < old < 12
        assert each.token_ids.tolist()[:old] == before[key].token_ids.tolist()[:old]
    assert mixed >= 1


def test_the_guard_passes_good_pushes(engine: RolloutRole, subject: Subject) -> None:
    guard = SyncGuard([[1, 2, 3, 4], [40] * 9], bound=subject.bound)
    for version in (1, 2):
        weights = changed(subject.trainer)
        other = subject.trainer.holding(weights)

        def score(sequences: Sequence[Sequence[int]], other: Trainer = other) -> list[np.ndarray]:
            return [said_by(other, sequence, 1) for sequence in sequences]

        assert guard.push(engine, weights, version, score).version == version
        with pytest.raises(RolloutError, match="canary"):
            guard.push(engine, subject.trainer.weights(), version, score)


def test_weights_of_another_model_are_refused(engine: RolloutRole, subject: Subject) -> None:
    weights = list(subject.trainer.weights())
    last, _ = weights[-1]
    for wrong in (
        weights[:-1],
        [*weights, ("model.extra.weight", torch.ones(3))],
        [*weights[:-1], (last, torch.ones(17))],
    ):
        with pytest.raises(RolloutError, match=rf"{re.escape(last)}|extra\.weight"):
            engine.push(wrong, 1)
        with pytest.raises(RolloutError, match="version 1 failed"):
            engine.step()
    engine.push(weights, 2)
    assert len(drained(engine, group())) == len(PROMPTS)


def test_sleep_changes_nothing(engine: RolloutRole) -> None:
    before = drained(engine, group())
    engine.submit([request("a", [1])])
    with pytest.raises(RolloutError, match="1 unfinished"):
        engine.sleep()
    engine.abort()
    engine.sleep()
    engine.wake()
    after = drained(engine, group())
    assert all(before[key].token_ids.tolist() == after[key].token_ids.tolist() for key in before)


def test_sequences_that_cannot_be_scored_are_refused(engine: RolloutRole) -> None:
    for wrong, begin in (([1] * (WINDOW + 1), 1), ([1, 2], 0), ([], 1), ([1, VOCABULARY], 1)):
        with pytest.raises(RolloutError, match="sequence 1"):
            engine.logprobs([[1, 2], wrong], [1, begin])
