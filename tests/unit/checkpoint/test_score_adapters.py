"""Adapters of reward models in PEFT's format: the head goes with them, and PEFT's own forward gives the same scores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from posttrain_lib.checkpoint.adapter_folder import compare_adapter, write_readme
from posttrain_lib.checkpoint.adapters import ADAPTER_FILE, CONFIG_FILE, load_adapter, save_adapter
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraDecoder, LoraSettings, apply_lora
from posttrain_lib.models.score import SCORE, init_score_head, with_score_head
from posttrain_lib.models.spec import ModelSpec
from tests.support.lora_cases import TOKENS, logits_of, scramble

peft = pytest.importorskip("peft", reason="the proof is PEFT's own forward")

SETTINGS = LoraSettings(rank=3, alpha=6.0, targets=("attention", "mlp"))
#: scores of order 1 in float32, whose products sum in another order
NEAR = 1e-5


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of the head that the base does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_of(folder: Path) -> tuple[Decoder, ModelSpec]:
    spec = with_score_head(spec_from_folder(folder))
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model, spec


@pytest.fixture(params=["llama", "gemma2"])
def source(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Path:
    return family_folder(request.param)


@pytest.fixture
def trained(source: Path) -> tuple[LoraDecoder, ModelSpec]:
    """As after training: every adapter and the head have values of their own."""
    model, spec = base_of(source)
    init_score_head(model, spec, seed=1)
    adapted = apply_lora(model, SETTINGS)
    scramble(adapted)
    with torch.no_grad():
        adapted.score.weight.mul_(30.0)
    return adapted, spec


def test_peft_scores_as_we_do(trained: tuple[LoraDecoder, ModelSpec], source: Path, tmp_path: Path) -> None:
    model, spec = trained
    assert save_adapter(model, spec, tmp_path, str(source)) == []
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        score = theirs(input_ids=TOKENS[None]).logits[0, 0]
        torch.testing.assert_close(logits_of(model)[-1, 0], score, rtol=NEAR, atol=NEAR)


def test_what_is_saved_comes_back(trained: tuple[LoraDecoder, ModelSpec], source: Path, tmp_path: Path) -> None:
    model, spec = trained
    save_adapter(model, spec, tmp_path)
    base, _ = base_of(source)
    again = load_adapter(base, spec, tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)
    assert torch.equal(logits_of(again), logits_of(model))


def test_peft_own_files_are_read(source: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, attn_implementation="eager")
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path)
    model, spec = base_of(source)
    adapted = load_adapter(model, spec, tmp_path)
    with torch.no_grad():
        score = theirs(input_ids=TOKENS[None]).logits[0, 0]
    torch.testing.assert_close(logits_of(adapted)[-1, 0].detach(), score, rtol=NEAR, atol=NEAR)


def test_the_export_is_held_against_the_checkpoint(
    trained: tuple[LoraDecoder, ModelSpec], source: Path, tmp_path: Path
) -> None:
    model, spec = trained
    state = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    assert SCORE in state
    save_adapter(model, spec, tmp_path)
    base, _ = base_of(source)
    assert compare_adapter(base, state, SETTINGS, tmp_path, source, spec).passed
    check = compare_adapter(base, {**state, SCORE: state[SCORE] * 1.01}, SETTINGS, tmp_path, source, spec)
    assert not check.passed and SCORE in check.reason


@pytest.mark.parametrize("fault", ["missing", "two labels"])
def test_an_adapter_without_this_head_is_refused(
    fault: str, trained: tuple[LoraDecoder, ModelSpec], source: Path, tmp_path: Path
) -> None:
    model, spec = trained
    save_adapter(model, spec, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    head = tensors.pop(f"base_model.model.{SCORE}")
    if fault == "two labels":
        tensors[f"base_model.model.{SCORE}"] = head.repeat(2, 1)
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(ModelError, match="score head"):
        load_adapter(base_of(source)[0], spec, tmp_path)


def test_a_causal_model_takes_no_adapter_of_a_reward_model(
    trained: tuple[LoraDecoder, ModelSpec], source: Path, tmp_path: Path
) -> None:
    save_adapter(*trained, tmp_path)
    spec = spec_from_folder(source)
    with pytest.raises(ModelError, match="not supported") as refusal:
        load_adapter(build_model(spec), spec, tmp_path)
    assert str(refusal.value.where).endswith("modules_to_save")


def test_the_readme_loads_a_classifier_of_one_label(tmp_path: Path) -> None:
    write_readme(tmp_path, "base", None, enclosed=False, remarks=[], scores=True)
    text = (tmp_path / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)' in text
