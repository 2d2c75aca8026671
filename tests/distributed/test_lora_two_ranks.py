"""Adapters in the loop on two processes: checkpoints that either layout goes on from."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.model import Lora
from tests.distributed.test_two_ranks import TwoRanks, assert_near, figures, run_rank, two_ranks
from tests.oracles.tiny_job import make_job, tiny_config

__all__ = ["two_ranks"]  # the fixture

LORA = Lora(rank=4, alpha=8.0, targets=("attention", "mlp", "embedding"), seed=3)


def test_adapters_train_and_resume_on_either_layout(two_ranks: TwoRanks, tmp_path: Path) -> None:
    config = tiny_config(steps=6, clip_norm=0.1)
    alone = run_rank(make_job(tmp_path, config, work="alone", lora=LORA))
    whole, second = two_ranks(make_job(tmp_path, config, work="whole", lora=LORA))
    assert_near(whole, alone)
    assert [figures(report) for report in whole] == [figures(report) for report in second]
    one, two = (load_model_state(tmp_path / f"{work}/checkpoints/step-00000006") for work in ("alone", "whole"))
    assert list(one) == list(two) and all("lora_" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)  # Adam divides by small moments

    # two ranks saved: two go on to the same bits, and one to the same figures
    two_ranks(make_job(tmp_path, config, work="cut", lora=LORA), stop_after=4)
    copy = tmp_path / "moved/checkpoints"
    copy.parent.mkdir()
    (tmp_path / "cut/checkpoints").rename(copy)
    assert_near(run_rank(make_job(tmp_path, config, work="moved", lora=LORA))[1:], whole[5:])
    two_ranks(make_job(tmp_path, config, work="again", lora=LORA), stop_after=4)
    resumed, _ = two_ranks(make_job(tmp_path, config, work="again", lora=LORA))
    assert [figures(report) for report in resumed[1:]] == [figures(report) for report in whole[5:]]
