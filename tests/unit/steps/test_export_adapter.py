"""A run that adds a token and trains adapters, from the tiny model to the folders: PEFT reads what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.config.load import load_run_config
from posttrain_lib.config.model import ModelConfig
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import StepManifest
from steps import export
from steps.pipeline import run_until

TINY = PROJECT_ROOT / "tests" / "flows" / "tiny.yaml"
ADDED = 'model.vocabulary={add_tokens: ["<plan>"]}'


def run(last: str, *changes: str) -> StepManifest:
    config = load_run_config(TINY, ["train.steps=2,train.evaluate_every_steps=2", *changes])
    return run_until(last, config, say=lambda _: None)[last]


@pytest.mark.slow
def test_peft_reads_the_adapter_of_a_grown_model_on_the_base_that_it_belongs_to(isolated_store: Path) -> None:
    peft = pytest.importorskip("peft", reason="the proof is PEFT's own forward")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = run("inputs").outputs["model"].uri
    lora = "model.lora={rank: 4, targets: [attention, embedding, head]}"
    made = run("export", "model.from_scratch=null", f"model.path={found}", ADDED, lora)
    assert made.checks[0].name == "adapter on its base = trained weights" and made.checks[0].passed

    folder, adapter = made.outputs["hf"].uri, Path(made.outputs["adapter"].uri)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, new = tokenizer("<plan> hi", return_tensors="pt").input_ids, tokenizer.convert_tokens_to_ids("<plan>")
    assert int(ids.max()) == new == json.loads((adapter / "base" / "config.json").read_text())["vocab_size"] - 1
    options: dict[str, Any] = {"dtype": torch.float32}
    merged = AutoModelForCausalLM.from_pretrained(folder, **options)
    base = AutoModelForCausalLM.from_pretrained(adapter / "base", **options)
    before = base.get_input_embeddings().weight.detach().clone()
    row = merged.get_input_embeddings().weight[new]
    assert (row - before[new]).abs().max() > before[new].abs().max(), "the new row was trained"
    with torch.no_grad():
        wanted = merged(ids).logits
        enclosed = peft.PeftModel.from_pretrained(base, adapter)(ids).logits
        named = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, **options)(ids).logits
    # float32: the sum with the adapter is rounded in the weight there and in the output here
    torch.testing.assert_close(enclosed, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named, wanted, rtol=1e-5, atol=1e-5)


def test_the_name_of_the_base(tmp_path: Path) -> None:
    source, stored = tmp_path / "input", tmp_path / "model"
    stored.mkdir()
    new = {"vocabulary": {"add_tokens": ["<plan>"]}}
    scratch: dict[str, Any] = {"from_scratch": {"architecture": {}}}
    cases: list[tuple[dict[str, Any], tuple[str, str | None]]] = [
        ({"path": str(stored)}, (str(source), None)),
        ({"path": "owner/name"}, ("owner/name", None)),
        ({"path": "owner/name@main"}, ("owner/name", "main")),
        ({"path": "s3://bucket/model"}, ("s3://bucket/model", None)),
        ({"path": "owner/name@main", **new}, (str(source), None)),
        ({"path": str(stored), **new}, (str(source), None)),
        (scratch, (str(source), None)),
    ]
    for section, name in cases:
        model = ModelConfig.model_validate(section)
        assert export._name_of_base(model, source) == name
        assert export._is_made(model) is ("path" not in section or "vocabulary" in section)
