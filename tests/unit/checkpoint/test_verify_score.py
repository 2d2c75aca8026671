"""Reward models in files: transformers loads what is exported and scores alike, and the gate sees what does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from posttrain_lib.checkpoint.hf import load_hf_weights, save_hf_folder
from posttrain_lib.checkpoint.verify_documents import Documents
from posttrain_lib.checkpoint.verify_score import compare_scores, verify_score_model
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.score import init_score_head, with_score_head
from tests.support.tiny_models import SCORE_CASES, write_tiny_score_model

Folder = Callable[[str], Path]
POOLED = "scores = transformers' of a padded batch"


@pytest.fixture(scope="module")
def score_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("scores")

    def folder(case: str) -> Path:
        path = root / case.replace(" ", "")
        return path if path.is_dir() else write_tiny_score_model(case, path)

    return folder


def loaded(folder: Path) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model


@pytest.mark.parametrize("case", SCORE_CASES)
def test_a_causal_model_becomes_a_folder_that_transformers_scores_alike(
    case: str, family_folder: Folder, tmp_path: Path
) -> None:
    source, out = family_folder(case), tmp_path / "out"
    spec = with_score_head(spec_from_folder(source))
    model = build_model(spec)
    load_hf_weights(model, spec, source)
    init_score_head(model, spec, seed=3)
    save_hf_folder(dict(model.state_dict()), spec, source, out, "float32")

    content = json.loads((out / "config.json").read_text())
    assert content["architectures"][0].endswith("ForSequenceClassification")
    assert content["num_labels"] == 1 and len(content["id2label"]) == 1 and content["pad_token_id"] == 0
    _, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = dict(loaded(out).named_parameters())
    assert list(again) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(again[name], value) for name, value in model.named_parameters())
    documents = Documents.random(spec, (40, 1, 13, 7, 60), seed=1)
    [check] = compare_scores(model, out, documents)
    assert check.passed, check


@pytest.mark.parametrize("tier", ["light", "blocks"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3, longrope", "mixtral"])
def test_transformers_own_folder_passes_the_gate(case: str, tier: str, score_folder: Folder) -> None:
    report = verify_score_model(score_folder(case), tier=tier)
    assert report.passed, [check for check in report.checks if not check.passed]
    names = [check.name for check in report.checks]
    assert {"logits, float32", "gradients", "packed = alone", "weights round trip"} <= set(names)
    assert (POOLED in names) == (tier == "light")


def test_a_folder_of_transformers_comes_back_bit_for_bit(score_folder: Folder, tmp_path: Path) -> None:
    folder, out = score_folder("qwen3"), tmp_path / "out"
    spec = spec_from_folder(folder)
    save_hf_folder(dict(loaded(folder).state_dict()), spec, folder, out, "float32")
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_another_head_fails(score_folder: Folder) -> None:
    folder = score_folder("llama")
    model, documents = loaded(folder), Documents.random(spec_from_folder(folder), (9, 30, 2), seed=0)
    assert compare_scores(model, folder, documents)[0].passed
    with torch.no_grad():
        model.score.weight[0, 5] *= 1.001
    assert not compare_scores(model, folder, documents)[0].passed


def test_documents_that_end_with_the_padding_token_are_seen(score_folder: Folder) -> None:
    folder = score_folder("llama")
    documents = Documents.random(spec_from_folder(folder), (9, 30, 2), seed=0)
    token_ids = documents.token_ids.clone()
    token_ids[38] = 0  # the end of the second: transformers scores the token before it
    assert not compare_scores(loaded(folder), folder, dataclasses.replace(documents, token_ids=token_ids))[0].passed


def test_without_a_padding_token_documents_are_compared_one_by_one(score_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(score_folder("llama"), tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "pad_token_id": None}))
    documents = Documents.random(spec_from_folder(folder), (9, 30, 2), seed=0)
    assert compare_scores(loaded(folder), folder, documents)[0].passed


def test_a_folder_without_the_head_is_refused(score_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(score_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("score.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensor") as refusal:
        verify_score_model(folder)
    assert "score.weight" in str(refusal.value.where)


def test_a_causal_model_is_no_reward_model(family_folder: Folder) -> None:
    with pytest.raises(ModelError, match="no reward model"):
        verify_score_model(family_folder("llama"))
