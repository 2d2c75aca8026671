"""Sampling: the right distribution, the nucleus, and a stream for each sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.evaluation import generation
from posttrain_lib.evaluation.generation import greedy_generate, sample_generate
from posttrain_lib.evaluation.sampling import Stream, sampled, seed_of
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from tests.oracles.tiny_job import write_model

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9], [40, 41, 42, 43], [63, 0, 63]]
SEEDS = [seed_of(0, prompt, 0) for prompt in PROMPTS]


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    folder = write_model(tmp_path / "model")
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=torch.float64)  # float64: a draw on the border of two tokens is out of reach
    load_hf_weights(model, spec, folder)
    return model


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -float("inf"), 2.0])
    stream = Stream(7)
    draws = torch.tensor([stream.draw() for _ in range(20000)], dtype=torch.float64)
    found = torch.bincount(sampled(logits.expand(20000, 4), draws, 0.5, 1.0), minlength=4) / 20000
    expected = (logits.double() / 0.5).softmax(-1)
    assert found[2] == 0
    assert (found - expected).abs().max() < 0.015  # four standard errors of 20,000 draws: 4 * sqrt(.25 / 20000)


def test_the_nucleus_is_the_smallest_set_of_enough_probability() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]

    def drawn(top_p: float) -> set[int]:
        return set(sampled(logits.expand(1000, 4), draws, 1.0, top_p).tolist())

    assert drawn(0.39) == {1} and drawn(0.5) == {1, 3} and drawn(0.75) == {1, 2, 3} and drawn(1.0) == {0, 1, 2, 3}


def test_the_largest_draw_gives_a_token_that_has_probability() -> None:
    logits = torch.full((1, 100), -1000.0)
    logits[0, :50] = torch.linspace(0, 1, 50)
    largest = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sampled(logits, largest, 1.0, 1.0).tolist() == [49]
    assert sampled(logits, largest, 1.0, 0.9).item() < 50


@pytest.mark.parametrize("tokens_per_forward", [1, 12])
def test_what_a_prompt_is_computed_with_changes_nothing(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, tokens_per_forward: int
) -> None:
    settings = {"temperature": 1.3, "top_p": 0.95}
    free = sample_generate(model, PROMPTS, 8, [], seeds=SEEDS, **settings)
    stop = free[1][2]  # then some leave early, and the others go on in other batches
    together = sample_generate(model, PROMPTS, 8, [stop], seeds=SEEDS, **settings)
    alone = [
        sample_generate(model, [prompt], 8, [stop], seeds=[seed], **settings)[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert together == alone
    assert len({len(tokens) for tokens in alone}) > 1
    order = [3, 0, 4, 2, 1]
    monkeypatch.setattr(generation, "_TOKENS_PER_FORWARD", tokens_per_forward)
    shuffled = sample_generate(
        model, [PROMPTS[i] for i in order], 8, [stop], seeds=[SEEDS[i] for i in order], **settings
    )
    assert shuffled == [together[i] for i in order]


def test_small_caches_change_nothing(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = greedy_generate(model, PROMPTS, 6, [])
    monkeypatch.setattr(generation, "_TOKENS_PER_CACHE", 16)
    assert greedy_generate(model, PROMPTS, 6, []) == whole


def test_a_cold_temperature_and_a_small_nucleus_are_greedy(model: Decoder) -> None:
    greedy = greedy_generate(model, PROMPTS, 6, [])
    assert sample_generate(model, PROMPTS, 6, [], seeds=SEEDS, temperature=1e-6) == greedy
    assert sample_generate(model, PROMPTS, 6, [], seeds=SEEDS, top_p=1e-9) == greedy


def test_samples_of_a_prompt_differ_and_come_again(model: Decoder) -> None:
    seeds = [seed_of(0, PROMPTS[0], number) for number in range(8)]
    assert len(set(seeds)) == 8 and seed_of(1, PROMPTS[0], 0) not in seeds
    first = sample_generate(model, [PROMPTS[0]] * 8, 6, [], seeds=seeds)
    assert len({tuple(tokens) for tokens in first}) > 1
    assert first == sample_generate(model, [PROMPTS[0]] * 8, 6, [], seeds=seeds)


def test_impossible_settings_are_refused(model: Decoder) -> None:
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            sample_generate(model, PROMPTS, 1, [], seeds=SEEDS, **wrong)
    with pytest.raises(ValueError, match="5 prompts need a seed each"):
        sample_generate(model, PROMPTS, 1, [], seeds=[1])
