"""A run with ``model.backend: hf``: said in the plan, the records, the card and the exported folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from metaflow.cards import Table

from posttrain_lib.adapters.hf_reference import load_reference, reference_logits
from posttrain_lib.adapters.metaflow_card import fill_report
from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, ModelError, VerificationError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.lineage.store import Store
from posttrain_lib.models.hf_spec import LACKS
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import convert_model, plan, report
from steps.base import run_step
from steps.export import BACKEND_FILE
from steps.pipeline import run_until
from tests.support.hf_models import write_hf_model

TINY = PROJECT_ROOT / "tests" / "flows" / "tiny.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a definition here, with a tokenizer of its own."""
    out = tmp_path_factory.mktemp("model") / "hf"
    build_tokenizer((turn["content"] for row in generate_rows(200, 0) for turn in row["messages"]), 320, out)
    facts = json.loads((out / "tokenizer.json").read_text())
    size = 1 + max([*facts["model"]["vocab"].values(), *(token["id"] for token in facts["added_tokens"])])
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return write_hf_model("gpt_neox", out, vocab_size=size, max_position_embeddings=1024, **special)


def config_of(folder: Path, *more: str) -> RunConfig:
    overrides = ["model.from_scratch=null", f"model.path={folder}", "model.backend=hf", *more]
    return load_run_config(TINY, overrides)


def test_the_plan_says_what_is_lacking(folder: Path) -> None:
    text = plan.describe(config_of(folder))
    assert "gpt_neox as GPTNeoXForCausalLM" in text
    assert "backend    hf: transformers' own class" in text
    assert all(lack in text for lack in LACKS)
    assert "backend" not in plan.describe(load_run_config(TINY))
    assert "as Qwen3ForCausalLM" in plan.describe(load_run_config(TINY, ["model.backend=hf"]))


def test_an_unknown_architecture_needs_it(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.backend: hf"):
        plan.describe(config_of(folder, "model.backend=native"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compute.devices_per_node=2", "one worker"),
        ("model.lora={rank: 2}", "has no lora"),
        ("model.vocabulary.add_tokens=['<x>']", "has no vocabulary.add_tokens"),
        ("model.path='s3://bucket/model'", "has no path in an object store"),
        ("model.verification.tier=blocks", "has no verification.tier: blocks"),
        ("data.max_example_tokens=2048,train.row_tokens=2048", "longer than the positions"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(folder: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan.describe(config_of(folder, override))


def test_a_class_that_is_no_decoder_stops_the_run(tmp_path: Path) -> None:
    model = write_hf_model("bert", tmp_path / "hf", is_decoder=False)
    ref = ArtifactRef(str(model), "hf_model", FileDigests().path(model))
    facts: dict[str, Any] = {key: {} for key in ("key_parts", "config", "inputs", "metrics", "environment", "code")}
    before = StepManifest("inputs", 1, "k", outputs={"model": ref}, checks=(), started_at="", seconds=0, **facts)
    said: list[str] = []
    with pytest.raises(VerificationError, match="cannot be trained as a decoder: no token sees a later one"):
        run_step(convert_model.STEP, config_of(model), {"inputs": before}, store=Store(tmp_path / "s"), say=said.append)
    assert any("not applicable, backend hf: sharded = single" in line for line in said)


class Card(list):
    """What a Metaflow card has of a list."""


@pytest.mark.slow
def test_a_run_from_rows_to_an_exported_folder(folder: Path, isolated_store: Path, tmp_path: Path) -> None:
    config = config_of(folder, "compute.launcher=in_process")
    manifests = run_until("export", config, say=lambda _: None)
    verified = json.loads(Path(manifests["convert_model"].outputs["verification"].uri).read_text())
    assert verified["passed"] and verified["backend"] == "hf" and verified["not_applicable"]
    assert manifests["train"].config["backend"] == "hf"
    for step in ("convert_model", "train", "export"):
        assert manifests[step].metrics["lacks"] == list(LACKS)
    evaluation = manifests["evaluate"].metrics
    assert evaluation["held_out_after"]["all"] < evaluation["held_out_before"]["all"]
    assert evaluation["exact_match"]["prompts"] == 8

    exported = Path(manifests["export"].outputs["hf"].uri)
    mark = json.loads((exported / BACKEND_FILE).read_text())
    assert mark == {"class": "GPTNeoXForCausalLM", "backend": "hf", "lacks": list(LACKS)}
    assert (exported / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    ids = torch.arange(3, 20)
    before, after = (reference_logits(load_reference(path, dtype=torch.float32), ids) for path in (folder, exported))
    assert not torch.allclose(before, after, atol=1e-3)
    assert all(check.passed for check in manifests["export"].checks)

    run_config = config.model_dump(mode="json")
    assert report.summarise(run_config, manifests)["backend"] == "hf"
    card = Card()
    fill_report(card, report.collect(run_config, manifests), manifests)
    headers = [part._headers for part in card if isinstance(part, Table)]
    assert ["what that lacks"] in headers

    # A model that was exported so is trained again by either backend; the mark goes with the backend.
    again = shutil.copytree(exported, tmp_path / "again")
    assert json.loads((again / BACKEND_FILE).read_text())["backend"] == "hf"
    assert "GPTNeoXForCausalLM" in plan.describe(config_of(again))
