"""What a loss of one's own can get wrong, and what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import ConfigError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.base import run_loss
from posttrain_lib.losses.contract import check_loss, pack, tiny_decoder, write_examples
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.training.checks import check_divisor


class Float(SFTLoss):
    def __call__(self, model: Any, batch: Any) -> Any:
        return 0.5


class OtherFigures(SFTLoss):
    figures = ("mine",)


class Detached(SFTLoss):
    def __call__(self, model: Any, batch: Any) -> Any:
        output = super().__call__(model, batch)
        return dataclasses.replace(output, local_sum=output.local_sum.detach())


class NoDivisor(SFTLoss):
    def divisor(self, batch: Any) -> float:
        return 0.0


class Raises(SFTLoss):
    def __init__(self, gamma: float = 2.0) -> None:
        raise RuntimeError("no such table")


class NoLoss:
    pass


HERE = "tests.unit.losses.test_own_loss"


@pytest.mark.parametrize(
    ("loss", "said"),
    [(Float(), "LossOutput"), (OtherFigures(), "the figures that it names"), (Detached(), "no gradient comes from")],
)
def test_what_it_returns(loss: Any, said: str, tmp_path: Path) -> None:
    (batch,) = pack(write_examples(tmp_path / "store", "document", 0), [(0, 1)], 1)
    with pytest.raises(ConfigError, match=said) as caught:
        run_loss(loss, tiny_decoder(0), to_torch(batch))
    assert f"{HERE}:{type(loss).__name__}" in str(caught.value)
    with torch.no_grad():  # held-out losses have no graph
        assert run_loss(SFTLoss(), tiny_decoder(0), to_torch(batch)).local_sum > 0


def test_a_divisor_of_nothing(tmp_path: Path) -> None:
    batches = pack(write_examples(tmp_path / "store", "document", 0), [(0, 1)], 1)
    with pytest.raises(ConfigError, match=r"NoDivisor has a divisor of 0\.0"):
        check_divisor(NoDivisor(), 0.0, batches)
    check_divisor(SFTLoss(), 0.0, pack(write_examples(tmp_path / "again", "document", 0), [()], 1))
    with pytest.raises(AssertionError, match="above 0"):
        check_loss(NoDivisor())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (f"{HERE}:NoLoss", {}, "is no loss"),
        (f"{HERE}:Raises", {}, "RuntimeError: no such table"),
        (f"{HERE}:Raises", {"gama": 1.0}, "did you mean 'gamma'"),
        ("sft", {"entropy": 0.1}, "did you mean 'entropy_bonus'"),
        ("sigmoid", {"scale": 1}, "no options"),
        ("sft", {"z_loss": "much"}, "TypeError"),
    ],
)
def test_what_it_is_made_with(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.loss") as caught:
        build_loss(name, options)
    assert said in str(caught.value)


@pytest.mark.parametrize("loss", [Float(), NoLoss()])
def test_the_contract_says_so_too(loss: Any) -> None:
    with pytest.raises(AssertionError, match=r"LossOutput|losses\.base\.Loss"):
        check_loss(loss)
