"""Scores of packed documents against each by itself and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain_lib.errors import DataError, ModelError
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.scoring import score_documents
from tests.support.tiny_models import write_tiny_score_model

LENGTHS = (17, 1, 60, 4, 33, 9, 2)
#: scores of order 1 after 4 layers in float32, whose products sum in another order where a row has another length
NEAR = 1e-5


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_score_model(request.param, tmp_path_factory.mktemp("scores") / "model")


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 96, length) for length in LENGTHS]


@pytest.mark.parametrize("row_tokens", [1, 40, 64, 10_000])
def test_packed_is_alone_whatever_the_rows_and_the_order(folder: Path, row_tokens: int) -> None:
    model, given = load_model(folder), documents()
    alone = np.array([score_documents(model, [document], 10_000)[0] for document in given])
    scores = score_documents(model, given, row_tokens)
    assert scores.dtype == np.float32 and scores.shape == (len(given),)
    np.testing.assert_allclose(scores, alone, rtol=NEAR, atol=NEAR)
    turned = score_documents(model, [document.tolist() for document in given[::-1]], row_tokens)
    np.testing.assert_allclose(turned[::-1], alone, rtol=NEAR, atol=NEAR)


def test_scores_are_those_of_transformers(folder: Path) -> None:
    model, given = load_model(folder), documents()
    given[3][-2:] = 0  # padding behind
    given[4][:5] = 0  # and before
    given[6][:] = 0  # nothing else
    reference = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = [float(reference(input_ids=torch.from_numpy(ids)[None]).logits[0, 0]) for ids in given]
    np.testing.assert_allclose(score_documents(model, given, 64, pad_token_id=0), theirs, rtol=NEAR, atol=NEAR)
    last = score_documents(model, given, 64)
    assert abs(last[3] - theirs[3]) > 1e-3  # without its id padding is a token as any other


def test_half_precision_is_near(folder: Path) -> None:
    model, given = load_model(folder), documents()
    half, full = (score_documents(model, given, 64, precision=precision) for precision in ("bf16", "fp32"))
    assert not np.array_equal(half, full)
    # bfloat16 keeps 8 bits: four layers of such roundings move scores by some per cent of their spread
    assert np.abs(half - full).mean() < 0.2 * full.std()


def test_no_documents_have_no_scores(folder: Path) -> None:
    assert score_documents(load_model(folder), [], 64).shape == (0,)


def test_what_has_no_score_is_refused(folder: Path, family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="empty document") as refusal:
        score_documents(load_model(folder), [[1, 2], []], 64)
    assert refusal.value.where == "document 1"
    with pytest.raises(ModelError, match="without a score head"):
        score_documents(load_model(family_folder("llama")), [[1, 2]], 64)
