"""Adapters in the one training loop: what is trained, what a checkpoint holds, what it goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint.adapters import trained_weights
from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.model import Lora
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import CheckpointError
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.perplexity import held_out_loss
from posttrain_lib.losses import build_loss
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config

LORA = Lora(rank=4, alpha=8.0, targets=("attention", "mlp", "embedding"), seed=3)


def run(job: TrainJob, stop_after: int | None = None) -> list[StepReport]:
    reports = []
    for report in train(job):
        reports.append(report)
        if report.step == stop_after:
            break
    return reports


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_a_run_trains_adapters_and_keeps_those_alone(tmp_path: Path, base_dtype: str) -> None:
    lora = LORA.model_copy(update={"base_dtype": base_dtype})
    config = tiny_config(steps=8, precision="bf16" if base_dtype == "bfloat16" else "fp32")
    reports = run(make_job(tmp_path, config, lora=lora, pad_vocabulary_to=48))
    last = reports[-1].held_out
    assert last is not None and reports[0].held_out is not None
    assert last["all"] < reports[0].held_out["all"] - 0.3
    checkpoint = tmp_path / "work/checkpoints/step-00000008"
    state = load_model_state(checkpoint)
    assert len(state) == 2 * (2 * 7 + 1) and all("lora_" in name for name in state)
    assert all(value.dtype == torch.float32 for value in state.values())

    model = load_model(tmp_path / "model", pad_vocabulary_to=48)
    weights = trained_weights(model, state, lora)
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    losses = held_out_loss(
        model,
        build_loss("sft", {}),
        TokenStore(tmp_path / "held_out"),
        row_tokens=32,
        batch_rows=2,
        precision="fp32",
    ).losses
    # merged in float32: sums in another order; a base and products in bfloat16 round by 2^-9 each
    assert losses["all"] == pytest.approx(last["all"], rel=1e-5 if base_dtype == "float32" else 2e-2)


def test_a_run_goes_on_from_its_adapters_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(steps=6)
    lora = Lora(rank=3, alpha=6.0, dora=True, rslora=True)
    whole = run(make_job(tmp_path, config, work="whole", lora=lora))
    run(make_job(tmp_path, config, work="cut", lora=lora), stop_after=4)
    resumed = run(make_job(tmp_path, config, work="cut", lora=lora))
    assert resumed[0].event.startswith("resumed") and resumed[0].step == 4
    assert [report.loss for report in resumed[1:]] == [report.loss for report in whole[5:]]
    one, other = (load_model_state(tmp_path / f"{work}/checkpoints/step-00000006") for work in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())


def test_a_checkpoint_of_other_adapters_or_another_base_is_refused(tmp_path: Path) -> None:
    config = tiny_config(steps=4)
    run(make_job(tmp_path, config, lora=LORA), stop_after=2)
    louder = LORA.model_copy(update={"alpha": 9.0})
    with pytest.raises(CheckpointError, match="lora differs"):
        run(make_job(tmp_path, config, lora=louder))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        run(make_job(tmp_path, config))
    weights = load_file(tmp_path / "model/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lora_base differs"):
        run(make_job(tmp_path, config, lora=LORA))


def test_the_same_settings_train_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config(steps=2)
    one, other, unlike = (
        run(make_job(tmp_path, config, work=work, lora=lora))[-1].loss
        for work, lora in (("a", LORA), ("b", LORA), ("c", LORA.model_copy(update={"seed": 4})))
    )
    assert one == other != unlike


def test_the_section_refuses_dora_of_what_is_no_projection() -> None:
    with pytest.raises(ValueError, match="take \\['experts', 'head'\\] out of targets"):
        Lora(dora=True, targets=("attention", "head", "experts"))
    assert json.loads(Lora().model_dump_json())["targets"] == ["attention", "mlp"]
