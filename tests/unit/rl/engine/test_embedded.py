"""The embedded engine beyond the contract: every family, slots, shared prompts, weights that break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.errors import RolloutError
from posttrain_lib.evaluation.generation import greedy_generate, sample_generate
from posttrain_lib.rl.engine import embedded as module
from posttrain_lib.rl.engine.weights import hf_weights
from tests.oracles.tiny_job import VOCABULARY, write_model
from tests.support.engines import drained, embedded, loaded, request
from tests.support.tiny_models import CASES

PROMPTS = [[5], list(range(1, 15)), [9, 9], [40, 41, 42, 43], [9, 9], [63, 0, 63], [9, 9], [5], [9, 9]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize("case", sorted(CASES))
def test_greedy_is_generation_in_every_family(case: str, family_folder: Callable[[str], Path]) -> None:
    """Sequences of several lengths come and go in three slots; groups share prompts; longrope's bound is crossed."""
    model, spec = loaded(family_folder(case))
    engine = module.EmbeddedEngine(model, spec, window=96, slots=3)
    prompts = [*PROMPTS, list(range(3, 47)), list(range(3, 47))]
    lengths = [12, 3, 9, 12, 1, 7, 5, 12, 4, 12, 8]
    requests = [
        request(str(number), prompt, length, temperature=0.0)
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    found = drained(engine, requests)
    expected = greedy_generate(model, prompts, 12, [])
    assert {key: completion.token_ids.tolist() for key, completion in found.items()} == {
        str(number): tokens[:length] for number, (tokens, length) in enumerate(zip(expected, lengths, strict=True))
    }


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_sampled_is_generation_whatever_the_slots(folder: Path, slots: int) -> None:
    """The same stream and the same order of probabilities as evaluation's sampler."""
    model, spec = loaded(folder)
    engine = module.EmbeddedEngine(model, spec, window=128, slots=slots)
    requests = [request(str(n), prompt, 20, seed=n, temperature=0.7) for n, prompt in enumerate(PROMPTS)]
    found = drained(engine, requests)
    seeds = range(len(PROMPTS))
    expected = sample_generate(model, PROMPTS, 20, [], seeds=seeds, temperature=0.7)
    assert [found[str(n)].token_ids.tolist() for n in seeds] == expected
    assert len({tuple(expected[n]) for n in (2, 4, 6, 8)}) == 4, "one prompt, four seeds"


def test_a_group_runs_its_prompt_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it enters in parts, for want of slots; after a push the prompt is run with the new weights."""
    model, spec = loaded(folder)
    engine = module.EmbeddedEngine(model, spec, window=128, slots=3)
    forwards: list[int] = []
    whole = module.next_logits

    def spy(model, new, cache):
        forwards.append(sum(map(len, new)))
        return whole(model, new, cache)

    monkeypatch.setattr(module, "next_logits", spy)
    prompt = list(range(20))
    drained(engine, [request(str(n), prompt, 1) for n in range(7)])
    assert forwards == [20]
    drained(engine, [request("again", prompt, 1)])
    assert forwards == [20, 20], "nothing is kept for requests that may never come"
    engine.submit([request(str(n), prompt, 1) for n in range(7)])
    engine.step()
    engine.push(hf_weights(model, spec), 1)
    engine.step()
    assert forwards == [20] * 4


def test_many_long_prompts_are_run_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLACES_PER_FORWARD", 30)
    model, spec = loaded(folder)
    engine = module.EmbeddedEngine(model, spec, window=128, slots=9)
    prompts = [[7] * length for length in (3, 40, 2, 2, 14, 15, 16)]
    found = drained(engine, [request(str(n), prompt, 6, temperature=0.0) for n, prompt in enumerate(prompts)])
    assert [found[str(n)].token_ids.tolist() for n in range(7)] == greedy_generate(model, prompts, 6, [])


def test_weights_that_break_stop_the_run_and_good_ones_go_on(folder: Path) -> None:
    """What the broken weights left behind is computed again."""
    model, spec = loaded(folder)
    engine = embedded(folder)
    good = [(name, tensor.clone()) for name, tensor in hf_weights(model, spec)]
    broken = [(name, torch.full_like(tensor, float("nan"))) for name, tensor in good]
    engine.submit([request(str(n), prompt, 10, temperature=0.0) for n, prompt in enumerate(PROMPTS)])
    engine.step()
    engine.push(broken, 1)
    with pytest.raises(RolloutError, match="not finite"):
        engine.step()
    with pytest.raises(RolloutError, match="does not work"):
        engine.step()
    engine.push(good, 2)
    found = drained(engine)
    assert [found[str(n)].token_ids.tolist() for n in range(len(PROMPTS))] == greedy_generate(model, PROMPTS, 10, [])
    assert set(found["0"].versions.tolist()) == {0, 2}


def test_a_step_that_fails_takes_no_draw_with_it(folder: Path) -> None:
    """What a seed gives does not go by the failures on the way."""
    model, spec = loaded(folder)
    engine = embedded(folder)
    good = [(name, tensor.clone()) for name, tensor in hf_weights(model, spec)]
    requests = [request(str(n), prompt, 10, seed=n) for n, prompt in enumerate(PROMPTS)]
    expected = drained(engine, requests)
    engine.submit(requests)
    engine.step()
    engine.push([(name, torch.full_like(tensor, float("nan"))) for name, tensor in good], 1)
    with pytest.raises(RolloutError, match="not finite"):
        engine.step()
    engine.push(good, 2)
    found = drained(engine)
    assert {key: each.token_ids.tolist() for key, each in found.items()} == {
        key: each.token_ids.tolist() for key, each in expected.items()
    }


def test_a_failed_push_stops_generation_until_a_good_one(folder: Path) -> None:
    model, spec = loaded(folder)
    engine = embedded(folder)
    weights = list(hf_weights(model, spec))
    with pytest.raises(RolloutError, match="not given all"):
        engine.push(weights[1:], 1)
    assert engine.version == 0
    for call in (engine.step, lambda: engine.logprobs([[1, 2]], [1]), lambda: engine.submit([])):
        with pytest.raises(RolloutError, match="the push of version 1 failed"):
            call()
    engine.push(weights, 1)
    assert engine.version == 1 and len(drained(engine, [request("a", [1])])) == 1


def test_hot_sampling_never_gives_a_padded_id(folder: Path) -> None:
    """Half of the rows stand for no token; at temperature 5 all 64 tokens come, and nothing else."""
    engine = embedded(folder, pad_to=128, slots=64)
    found = drained(engine, [request(str(n), [n], 40, seed=n, temperature=5.0) for n in range(64)])
    assert set(np.concatenate([each.token_ids for each in found.values()]).tolist()) == set(range(VOCABULARY))


def test_a_closed_engine_says_so(folder: Path) -> None:
    engine = embedded(folder)
    engine.submit([request("a", [1])])
    engine.close()
    for call in (engine.step, engine.sleep, lambda: engine.submit([]), lambda: engine.push([], 1)):
        with pytest.raises(RolloutError, match="closed"):
            call()


def test_stop_strings_need_a_decode(folder: Path) -> None:
    with pytest.raises(RolloutError, match="request a"):
        embedded(folder).submit([request("a", [1], stop_strings=("x",))])
