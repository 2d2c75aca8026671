"""Weights that leave nothing to compare with: the reference is named, not our definition."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint import verify
from posttrain_lib.checkpoint.verify_gradients import REFERENCE, check_gradients
from posttrain_lib.schema.manifests import Check
from tests.support.tiny_models import write_tiny_model


def failed(case: str, factor: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What of the outputs' and gradients' checks fails on a model whose every weight is ``factor`` times as large."""
    path = write_tiny_model(case, folder / "model") / "model.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    save_file({name: value * factor for name, value in load_file(path).items()}, path, metadata=metadata)
    monkeypatch.setattr(verify, "CHECKS", (verify.CHECKS[0], check_gradients))
    return [check for check in verify.verify_model(path.parent).checks if not check.passed]


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_gradients_that_are_all_zero(case: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = failed(case, factor, tmp_path, monkeypatch)
    assert check.name == REFERENCE and "every gradient of the reference is zero" in check.reason


def test_a_reference_that_rounding_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failed("qwen3", 100.0, tmp_path, monkeypatch)
    assert [check.name for check in found] == [REFERENCE, "gradients"]
    value, limit = found[0].value, found[0].limit
    assert isinstance(value, float) and isinstance(limit, float) and value > limit > 0


def test_ordinary_weights_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed("qwen3", 1.0, tmp_path, monkeypatch) == []
