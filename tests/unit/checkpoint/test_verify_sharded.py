"""The gate's check of sharding: it passes for what is right, and sees a cut that forgets a sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint import verify_sharded
from posttrain_lib.checkpoint.verify_sharded import check_sharded, one_layer_of_each_kind
from posttrain_lib.models.families import spec_from_folder


def test_a_family_passes_both_ways(family_folder: Callable[[str], Path]) -> None:
    checks = check_sharded(spec_from_folder(family_folder("gpt_oss")))
    assert [(check.name, check.passed) for check in checks] == [
        ("sharded = single, fsdp", True),
        ("sharded = single, tensor parallel", True),
    ]
    assert any(check.value > 0 for check in checks)  # sums over ranks have another order: it is no empty comparison


def test_each_kind_of_layer_is_there_once(family_folder: Callable[[str], Path]) -> None:
    spec = spec_from_folder(family_folder("deepseek_v3"))
    assert len(spec.config.layers) == 4
    assert len(one_layer_of_each_kind(spec).config.layers) == 2


@pytest.mark.parametrize("fault", ["scaled", "missing", "nan", "nan in front"])
def test_a_wrong_gradient_is_seen(fault: str) -> None:
    right = verify_sharded._Result(torch.ones(3), {"a": torch.ones(2), "b": torch.ones(2)})
    wrong = {
        "scaled": {"a": torch.ones(2), "b": torch.ones(2) / 2},
        "missing": {"a": torch.ones(2)},
        "nan": {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])},
        "nan in front": {"b": torch.tensor([float("nan"), 1.0]), "a": torch.ones(2)},
    }[fault]
    check = verify_sharded._compared("fsdp", right, [right, verify_sharded._Result(torch.ones(3), wrong)])
    assert not check.passed
    assert "largest in b" in check.reason
    assert verify_sharded._compared("fsdp", right, [right, right]).passed
