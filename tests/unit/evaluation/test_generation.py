"""Greedy generation and log-probs against the plain way: one sequence at a time, all logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.evaluation import generation
from posttrain_lib.evaluation.answers import exact_match, majority_baseline
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.ops.output_head import OutputHead
from tests.oracles.tiny_job import VOCABULARY, write_model
from tests.support.tiny_models import CASES

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9], [40, 41, 42, 43], [63, 0, 63]]


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    folder = write_model(tmp_path / "model")
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=torch.float64)  # float64: no near ties between the packed and the plain way
    load_hf_weights(model, spec, folder)
    return model


def logits(model: Decoder, tokens: list[int]) -> torch.Tensor:
    length = len(tokens)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)


def plain_greedy(model: Decoder, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    made: list[int] = []
    while len(made) < most and not (made and made[-1] in stops):
        made.append(int(logits(model, prompt + made)[-1].argmax()))
    return made


@pytest.mark.parametrize("tokens_per_forward", [1, 12, 8192])
def test_greedy_is_the_plain_way_however_prompts_are_grouped(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, tokens_per_forward: int
) -> None:
    monkeypatch.setattr(generation, "_TOKENS_PER_FORWARD", tokens_per_forward)
    free = [plain_greedy(model, prompt, 6, set()) for prompt in PROMPTS]
    stop = free[1][2]  # some prompts stop early, others run to the end
    expected = [plain_greedy(model, prompt, 6, {stop}) for prompt in PROMPTS]
    found = greedy_generate(model, PROMPTS, 6, [stop])
    assert found == expected
    assert found[1][-1] == stop
    assert len({len(tokens) for tokens in found}) > 1


def test_token_logprobs_are_those_of_the_full_logits(model: Decoder) -> None:
    found = token_logprobs(model, PROMPTS)
    for prompt, values in zip(PROMPTS, found, strict=True):
        table = logits(model, prompt).log_softmax(-1)
        expected = [float(table[i - 1, token]) for i, token in enumerate(prompt) if i > 0]
        assert values == pytest.approx(expected, rel=1e-9)


def test_only_the_last_positions_reach_the_head(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, whole = [], OutputHead.logits

    def spy(head: OutputHead, hidden: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(hidden.shape))
        return whole(head, hidden)

    monkeypatch.setattr(OutputHead, "logits", spy)
    greedy_generate(model, PROMPTS, 1, [VOCABULARY])
    assert shapes == [(len(PROMPTS), 16)]


@pytest.mark.parametrize("case", sorted(CASES))
def test_cached_generation_is_the_plain_way_in_every_family(case: str, family_folder: Callable[[str], Path]) -> None:
    """Keys, values, windows, latents, recurrent states and the convolution's tail: all kept between steps."""
    spec = spec_from_folder(family_folder(case))
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, family_folder(case))
    prompts = [[5], list(range(1, 15)), [9, 9], [40, 41, 42, 43]]
    assert greedy_generate(model, prompts, 12, []) == [plain_greedy(model, prompt, 12, set()) for prompt in prompts]


def test_nothing_to_do(model: Decoder) -> None:
    assert greedy_generate(model, [], 4, []) == []
    assert greedy_generate(model, PROMPTS, 0, []) == [[] for _ in PROMPTS]


def test_exact_match_and_majority() -> None:
    assert exact_match([" red\n", "blue", "Red"], ["red", "red", "red"]) == pytest.approx(1 / 3)
    assert exact_match([], []) == 0.0
    assert majority_baseline(["red", "blue", "red "]) == ("red", pytest.approx(2 / 3))
    assert majority_baseline([]) == ("", 0.0)
    with pytest.raises(ValueError, match="argument 2"):
        exact_match(["red"], ["red", "blue"])
