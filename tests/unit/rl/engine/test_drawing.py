"""Tokens and log-probabilities out of the same logits: those of the plain softmax, drawn in the order of ids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posttrain_lib.evaluation.sampling import sampled
from posttrain_lib.rl.engine.drawing import next_tokens


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_draws_are_those_of_the_whole_sum(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(500, vocabulary, dtype=torch.float64) * 3
    draws = torch.rand(500, dtype=torch.float64)
    tokens, logprobs = next_tokens(logits, [temperature] * 500, draws.tolist())
    assert tokens == sampled(logits, draws, temperature, 1.0).tolist()
    expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-12)


def test_float32_and_bfloat16_logits_give_float32_log_probabilities() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(200, 3000) * 3).to(dtype)
        tokens, logprobs = next_tokens(logits, [0.8] * 200, torch.rand(200).tolist())
        expected = (logits.double() / 0.8).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        # float32 numbers of size 10, and a sum of 3,000 of them made in float64
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_temperatures_stand_side_by_side() -> None:
    logits, draws = torch.randn(6, 40), torch.rand(6).tolist()
    temperatures = [0.0, 1.0, 0.0, 0.5, 2.0, 1.0]
    together = next_tokens(logits, temperatures, draws)
    alone = [next_tokens(row[None], [t], [u]) for row, t, u in zip(logits, temperatures, draws, strict=True)]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    assert together[1] == pytest.approx([logprobs[0] for _, logprobs in alone], abs=1e-6)
    assert together[0][0] == int(logits[0].argmax())
    # the likeliest token's log-probability is that at temperature 1
    assert together[1][0] == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=1e-6)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert next_tokens(logits, [0.0], [0.9])[0] == [1]


def test_the_ends_of_the_draw_give_tokens_that_have_probability() -> None:
    logits = torch.full((2, 700), -math.inf)
    logits[:, 300:340] = torch.linspace(0, 1, 40)
    tokens, _ = next_tokens(logits, [1.0, 1.0], [0.0, float(np.nextafter(1.0, 0.0))])
    assert tokens == [300, 339]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution_give_nan(wrong: float) -> None:
    logits = torch.zeros(3, 300)
    logits[1, 7], logits[2] = wrong, -math.inf
    logprobs = next_tokens(logits, [1.0, 1.0, 0.0], [0.5] * 3)[1]
    assert [math.isnan(value) for value in logprobs] == [False, True, True]
