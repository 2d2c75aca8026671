"""Reward models: which head, what becomes of a causal language model, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.hf import check_hf_folder, load_hf_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import FAMILIES, spec_from_config, spec_from_folder
from posttrain_lib.models.lora import LoraSettings, adaptable_weights, apply_lora, merged_state_dict
from posttrain_lib.models.score import SCORE, init_score_head, score_architecture, with_score_head
from posttrain_lib.models.spec import ModelSpec, matmul_parameters
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from tests.support.tiny_models import SCORE_CASES, write_tiny_score_model

Folder = Callable[[str], Path]
TOKENS = torch.tensor([5, 9, 3, 7, 11, 4])
CU_SEQLENS = torch.tensor([0, 4, 6], dtype=torch.int32)
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1])


def begun(folder: Path, seed: int = 0) -> tuple[Decoder, ModelSpec]:
    """A reward model made of a causal language model's folder."""
    spec = with_score_head(spec_from_folder(folder))
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, seed)
    return model, spec


def run(model: Decoder, *output: Any) -> Any:
    return model(TOKENS, POSITIONS, CU_SEQLENS, 4, *output)


@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3_moe"])
def test_the_head_is_one_plain_row_on_the_body_of_the_causal_model(case: str, family_folder: Folder) -> None:
    source = family_folder(case)
    causal_spec = spec_from_folder(source)
    causal = build_model(causal_spec)
    load_hf_weights(causal, causal_spec, source)
    model, spec = begun(source)
    names = dict(model.named_parameters())
    assert "lm_head.weight" not in names and names[SCORE].shape == (1, spec.config.hidden_size)
    theirs = {name: value for name, value in causal.named_parameters() if name != "lm_head.weight"}
    assert all(torch.equal(names[name], value) for name, value in theirs.items())
    assert set(names) == {*theirs, SCORE}
    hidden = run(causal, lambda hidden_TD, _head: hidden_TD)
    # Gemma-2 bounds its logits, and ties its head: a score is neither bounded nor tied.
    assert torch.equal(run(model), hidden @ names[SCORE].t())
    assert run(model, lambda hidden_TD, head: head.logits(hidden_TD)[:, 0]).shape == (6,)


def test_a_padded_vocabulary_does_not_pad_the_head(family_folder: Folder) -> None:
    folder = family_folder("qwen3")
    spec = with_score_head(with_padded_vocabulary(spec_from_folder(folder), 64))
    assert spec.parameter_shapes()["embed_tokens.weight"][0] == 128
    assert spec.parameter_shapes()[SCORE][0] == 1
    model, plain = build_model(spec), begun(folder)[0]
    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, 0)
    assert torch.equal(run(model), run(plain))
    assert matmul_parameters(spec)[1] == spec.config.hidden_size


def test_the_head_begins_as_transformers_does_by_seed_and_name(family_folder: Folder) -> None:
    folder = family_folder("llama")
    first, again, other = (begun(folder, seed)[0].score.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    wide = spec_from_config(
        {**spec_from_folder(folder).hf_config, "hidden_size": 4096, "head_dim": 8, "initializer_range": 0.05}
    )
    spec = with_score_head(wide)
    model = torch.nn.Module()
    model.score = torch.nn.Linear(4096, 1, bias=False)
    init_score_head(model, spec, 0)
    # the standard deviation of 4,096 normal values is off by 1 / sqrt(2 * 4096) = 1.1 % of itself; five times that
    assert model.score.weight.std().item() == pytest.approx(0.05, rel=0.055)


def test_a_head_that_the_folder_holds_is_not_begun_again(tmp_path: Path) -> None:
    folder = write_tiny_score_model("llama", tmp_path / "model")
    spec = spec_from_folder(folder)
    assert spec.config.score_head and not spec.initialised and with_score_head(spec) is spec
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    loaded = model.score.weight.clone()
    init_score_head(model, spec, 0)
    assert torch.equal(model.score.weight, loaded) and loaded.isfinite().all()
    check_hf_folder(folder)


def test_a_forgotten_beginning_shows(family_folder: Folder) -> None:
    spec = with_score_head(spec_from_folder(family_folder("llama")))
    model = build_model(spec)
    load_hf_weights(model, spec, family_folder("llama"))
    assert run(model).isnan().all()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_a_class_in_transformers_or_is_refused(name: str) -> None:
    if name in ("granite", "olmoe"):
        with pytest.raises(ModelError, match="no sequence classification class") as refusal:
            score_architecture(name)
        assert "llama" in str(refusal.value.expected) and name not in str(refusal.value.expected).split(", ")
    else:
        assert score_architecture(name).endswith("ForSequenceClassification")


def test_the_classes_of_all_cases_are_there() -> None:
    assert len(SCORE_CASES) >= 17  # the tests that go through them are no empty loops


@pytest.mark.parametrize(
    ("changes", "where", "got"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "id2label", "2 labels"),
        ({"id2label": None}, "num_labels", "2 labels"),  # transformers' default
        ({"id2label": None, "num_labels": 5}, "num_labels", "5 labels"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures", ["Qwen2ForSequenceClassification"]),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures", ["LlamaForTokenClassification"]),
    ],
)
def test_what_is_no_reward_model_is_refused(changes: dict[str, Any], where: str, got: Any, tmp_path: Path) -> None:
    folder = write_tiny_score_model("llama", tmp_path / "model")
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    with pytest.raises(ModelError) as refusal:
        spec_from_config(content)
    assert refusal.value.where.endswith(where) and refusal.value.got == str(got)


def test_one_label_may_be_said_either_way(tmp_path: Path) -> None:
    folder = write_tiny_score_model("llama", tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    assert spec_from_config({**content, "id2label": None, "num_labels": 1}).config.score_head
    assert spec_from_config({**content, "num_labels": 1}).config.score_head


@pytest.mark.parametrize("padding", [None, 2, 96, -1])
def test_a_padding_token_of_its_own_is_demanded(padding: int | None, family_folder: Folder) -> None:
    spec = spec_from_folder(family_folder("llama"))
    content = {**spec.hf_config, "pad_token_id": padding}  # 2 is eos_token_id, 96 the vocabulary's size
    with pytest.raises(ModelError, match="padding token") as refusal:
        with_score_head(spec_from_config(content))
    assert refusal.value.where == "config.json: pad_token_id"
    assert with_score_head(spec_from_config(content), pad_token_id=7).hf_config["pad_token_id"] == 7


def test_adapters_leave_the_head_trained_in_float32(family_folder: Folder) -> None:
    folder = family_folder("qwen3")
    spec = with_score_head(spec_from_folder(folder))
    model = build_model(spec, torch.bfloat16)
    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, 0)
    assert SCORE not in adaptable_weights(model)
    adapted = apply_lora(model, LoraSettings(rank=2, alpha=4.0, targets=("attention", "mlp", "embedding")))
    assert adapted.score.weight.dtype == torch.float32 and adapted.score.weight.requires_grad
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained == {SCORE, *(part for one in adapted.adapters.values() for part in one.parts.values())}
    scores = run(adapted)
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()
    scores.sum().backward()
    assert adapted.score.weight.grad.dtype == torch.float32 and adapted.score.weight.grad.any()
    merged = merged_state_dict(adapted)
    assert set(merged) == set(spec.parameter_shapes())
    assert torch.equal(merged[SCORE], adapted.score.weight)


def test_the_head_is_no_target_of_adapters(family_folder: Folder) -> None:
    model, _ = begun(family_folder("gemma2"))  # whose causal head is the embedding, which "head" would mean there
    with pytest.raises(ModelError, match="does not have"):
        apply_lora(model, LoraSettings(rank=2, alpha=4.0, targets=("head",)))
