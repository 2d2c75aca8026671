"""The step that lets no wrong model through, and what its result depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.config import load_run_config
from posttrain_lib.errors import VerificationError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, source_digests
from posttrain_lib.lineage.store import Store
from posttrain_lib.models import attention
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import convert_model
from steps.base import content_key, run_step
from steps.pipeline import DEFAULT_CONFIG
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen3", tmp_path_factory.mktemp("model") / "hf")


def _inputs(folder: Path) -> dict[str, StepManifest]:
    ref = ArtifactRef(str(folder), "hf_model", FileDigests().path(folder))
    facts: dict[str, Any] = {key: {} for key in ("key_parts", "config", "inputs", "metrics", "environment", "code")}
    return {
        "inputs": StepManifest("inputs", 1, "k", outputs={"model": ref}, checks=(), started_at="", seconds=0, **facts)
    }


def test_a_right_model_passes_once_and_is_then_reused(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path / "store")
    config = load_run_config(DEFAULT_CONFIG)
    first = run_step(convert_model.STEP, config, _inputs(folder), store=store, say=said.append)
    report = json.loads(Path(first.outputs["verification"].uri).read_text())
    assert report["passed"] is True
    assert [check.name for check in first.checks] == [check["name"] for check in report["checks"]]
    assert any("passed logits, float32" in line for line in said)
    # The value stands before the words that it counts.
    assert any("passed weights round trip (0, limit 0; of " in line for line in said)
    again = run_step(convert_model.STEP, config, _inputs(folder), store=store, say=said.append)
    assert again.reused


def test_a_wrong_definition_stops_the_run_and_names_the_module(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.packed_attention
    monkeypatch.setattr(
        attention, "packed_attention", lambda *args, scale, **options: right(*args, scale=scale * 1.02, **options)
    )
    with pytest.raises(VerificationError, match="logits, float32") as caught:
        run_step(convert_model.STEP, load_run_config(DEFAULT_CONFIG), _inputs(folder), store=Store(tmp_path), say=print)
    assert "layers.0.attention" in str(caught.value.where)
    assert "scale" in str(caught.value.fix)


def test_weights_that_no_definition_could_be_compared_on_are_not_ours_to_blame(folder: Path, tmp_path: Path) -> None:
    zeros = Path(shutil.copytree(folder, tmp_path / "hf")) / "model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(zeros).items()}, zeros, {"format": "pt"})
    with pytest.raises(VerificationError, match="reference itself is not numerically usable") as caught:
        run_step(
            convert_model.STEP,
            load_run_config(DEFAULT_CONFIG),
            _inputs(zeros.parent),
            store=Store(tmp_path / "store"),
            say=print,
        )
    assert "every gradient of the reference is zero" in str(caught.value)
    assert "our definition" not in str(caught.value)


def test_the_result_depends_on_weights_code_and_environment(folder: Path, tmp_path: Path) -> None:
    config, found = load_run_config(DEFAULT_CONFIG), _inputs(folder)
    other = shutil.copytree(folder, tmp_path / "hf")
    with open(other / "model.safetensors", "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\0")
    keys = {
        content_key(convert_model.STEP, config, convert_model.inputs(config, _inputs(place)))[0]
        for place in (folder, other)
    }
    assert len(keys) == 2
    _, parts = content_key(convert_model.STEP, config, convert_model.inputs(config, found))
    assert set(parts) == {"version", "config", "inputs", "source", "environment"}  # the last one has the versions
    sources = set(source_digests("steps.convert_model"))
    for pattern in ("models/families/*.py", "checkpoint/verify*.py", "adapters/hf_reference*.py"):
        files = {path.relative_to(PROJECT_ROOT).as_posix() for path in (PROJECT_ROOT / "posttrain_lib").glob(pattern)}
        assert files
        assert files <= sources
    for name in ("models/attention", "models/lora", "ops/experts", "ops/cache", "ops/gated_delta"):
        assert f"posttrain_lib/{name}.py" in sources
