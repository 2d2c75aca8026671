"""Under autocast the products of a model are in half precision, and a loss's own sums are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain_lib.data.collate import to_torch
from posttrain_lib.evaluation.perplexity import with_signals
from posttrain_lib.losses import LOSSES, build_loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import other_than, pack, tiny_decoder, write_examples
from tests.support.score_decoder import score_decoder
from tests.unit.losses.test_policy import Sampled

#: "policy" learns from rollouts
OF_EXAMPLES = [name for name in LOSSES if name != "policy"]


@pytest.mark.parametrize("name", [*OF_EXAMPLES, "policy"])
def test_the_sum_is_that_of_the_items_to_float32s_rounding(name: str, tmp_path: Path) -> None:
    loss = Sampled() if name == "policy" else build_loss(name)
    model = (score_decoder() if name == "reward" else tiny_decoder()).float()
    if loss.needs is not None:
        loss.attach(Beside(other_than(model)))
    store = write_examples(tmp_path / "store", "pair" if loss.kind == "pair" else "document", seed=0)
    (arrays,) = pack(store, [tuple(range(6))], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(model, to_torch(with_signals(arrays, loss, "train")))
    assert output.local_sum.dtype in (torch.float32, torch.float64)
    expected = float((output.values.double() * output.weights.double()).sum())
    assert output.local_sum.item() == pytest.approx(expected, rel=1e-6)
