"""Recipes on pairs in the one training loop: a reference kept in three ways, a reward model, and going on from both."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.model import Lora
from posttrain_lib.data.signal_table import SignalWriter
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.evaluation.frozen import store_document_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.perplexity import Means, held_out_loss
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.base import Loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.dpo import DPOLoss
from posttrain_lib.schema.companion import Companion
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.incidents import read_log
from posttrain_lib.training.job import TrainJob
from tests.support.pair_jobs import PADDING, ROW_TOKENS, live, pair_config, pair_job, stored_logprobs
from tests.support.tiny_models import write_tiny_model
from tests.unit.training.test_loop_lora import run

LORA = Lora(rank=4, alpha=8.0, targets=("attention", "mlp"), seed=3)
#: a log-probability of up to 100 is stored in float32, to 8e-6 at worst, times beta; measured: 2e-7 of a loss
STORED: dict[str, float] = {"rel": 1e-5, "abs": 1e-5}
#: float32 sums in another order, 6e-8 each
NEAR: dict[str, float] = {"rel": 1e-5, "abs": 1e-6}
#: the same of differences between log-probabilities of tens
FIGURES: dict[str, float] = {"rel": 1e-4, "abs": 1e-5}


def assert_alike(one: list[StepReport], other: list[StepReport], near: dict[str, float]) -> None:
    assert [report.step for report in one] == [report.step for report in other]
    for left, right in zip(one, other, strict=True):
        for name in ("loss", "grad_norm", "held_out", "held_out_figures", "figures", "source_loss"):
            expected = getattr(right, name)
            # a norm and log-probabilities are tens, and rewards beside them 0.01
            assert getattr(left, name) == (expected if expected is None else pytest.approx(expected, **near)), name


def weights_of(work: Path, step: int) -> dict[str, torch.Tensor]:
    return load_model_state(work / f"checkpoints/step-{step:08d}")


def assert_same_bits(one: Path, other: Path, step: int) -> None:
    weights, found = weights_of(one, step), weights_of(other, step)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_reference_stored_live_or_underneath_trains_the_same(lora: Lora | None, tmp_path: Path) -> None:
    config, runs = pair_config(steps=4), {}
    jobs = {kept: pair_job(tmp_path, config, kept, lora=lora) for kept in ("live", "stored", "base")}
    ways = {"live": live(tmp_path), "stored": stored_logprobs(tmp_path), "base": Companion("base")}
    for kept, companion in ways.items() if lora else list(ways.items())[:2]:
        runs[kept] = run(dataclasses.replace(jobs[kept], companion=companion))
        first, figures = runs[kept][0].held_out, runs[kept][0].held_out_figures
        assert first is not None and first["all"] == pytest.approx(math.log(2), **STORED)
        assert figures["rewards/margin"] == pytest.approx(0.0, abs=1e-5)
        if kept != "stored":  # the same products, twice
            assert first["all"] == pytest.approx(math.log(2), rel=1e-7)  # of float64, through float32 sums
            assert figures["kl"] == figures["rewards/margin"] == 0.0
    last = runs["live"][-1].held_out
    assert last is not None and last["all"] < math.log(2), "it learns"
    for kept in list(runs)[1:]:
        # until the first update every pair is a tie, which the rounding of stored ones decides: no accuracy there
        assert runs[kept][1].loss == pytest.approx(math.log(2), **STORED)
        assert_alike(runs[kept][2:], runs["live"][2:], STORED)
        for name, value in weights_of(tmp_path / "live", 4).items():
            found = weights_of(tmp_path / kept, 4)[name]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)  # Adam divides by small moments
    if lora:  # the same products of the same weights
        assert [report.loss for report in runs["base"]] == [report.loss for report in runs["live"]]


@pytest.mark.parametrize("kept", ["live", "stored"])
def test_a_run_on_pairs_goes_on_bit_for_bit(kept: str, tmp_path: Path) -> None:
    job = pair_job(tmp_path, pair_config(steps=4), "whole")
    job = dataclasses.replace(job, companion=live(tmp_path) if kept == "live" else stored_logprobs(tmp_path))
    assert_goes_on(job, tmp_path)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_reward_model_goes_on_bit_for_bit_and_is_loaded(lora: Lora | None, tmp_path: Path) -> None:
    job = pair_job(tmp_path, pair_config("reward", steps=4), "whole", lora=lora, score_padding=PADDING)
    whole = assert_goes_on(job, tmp_path)
    if lora is None:
        last = whole[-1].held_out
        model = load_model(tmp_path / "model", score_padding=PADDING)
        model.load_state_dict(weights_of(tmp_path / "whole", 4))
        again = held(build_loss("reward"), model, tmp_path, ROW_TOKENS)
        assert again.losses == pytest.approx(last, **NEAR)
        assert again.figures == pytest.approx(whole[-1].held_out_figures, **NEAR)


def assert_goes_on(job: TrainJob, folder: Path) -> list[StepReport]:
    """Stopped after two of four steps, and resumed; the reports of the whole run."""
    whole, cut = run(job), dataclasses.replace(job, work_dir=str(folder / "cut"))
    run(cut, stop_after=2)
    resumed = run(cut)
    assert resumed[0].event.startswith("resumed") and resumed[0].step == 2
    names = ("loss", "grad_norm", "figures", "held_out", "held_out_figures", "source_loss", "source_units", "rows")
    told = [[[getattr(report, name) for name in names] for report in part] for part in (resumed[1:], whole[3:])]
    assert told[0] == told[1]
    assert_same_bits(folder / "whole", folder / "cut", 4)
    return whole


def held(loss: Loss, model: Any, folder: Path, row_tokens: int) -> Means:
    return held_out_loss(model, loss, TokenStore(folder / "held_out"), row_tokens=row_tokens)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_how_long_rows_are_changes_no_held_out_figure(name: str, tmp_path: Path) -> None:
    pair_job(tmp_path, pair_config())
    loss, padding = build_loss(name, {}), PADDING if name == "reward" else None
    model = load_model(tmp_path / "model", score_padding=padding, seed=1).double()
    if isinstance(loss, DPOLoss):
        other = load_model(tmp_path / "model").double()
        with torch.no_grad():
            other.norm.weight.mul_(1.3)
        loss.attach(Beside(other))
    found = [held(loss, model, tmp_path, row_tokens) for row_tokens in (64, 96, 512)]
    assert set(found[0].losses) == {"all", "chat", "tools"} and set(found[0].figures) == set(loss.figures)
    for means in found[1:]:
        # float64 sums in another order; parts of a head's work stay in float32
        assert means.losses == pytest.approx(found[0].losses, rel=1e-6)
        assert means.figures == pytest.approx(found[0].figures, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_how_a_step_is_cut_into_micro_batches_changes_no_figure(name: str, tmp_path: Path) -> None:
    padding = PADDING if name == "reward" else None
    runs = []
    for rows in (4, 1):
        job = pair_job(tmp_path, pair_config(name, steps=3, micro_batch_rows=rows), f"of-{rows}", score_padding=padding)
        runs.append(run(dataclasses.replace(job, companion=live(tmp_path))))
    # the first step's pairs are ties: see above
    assert_alike(runs[1][2:], runs[0][2:], FIGURES)
    assert [report.hardware_flops for report in runs[1]] == pytest.approx([report.hardware_flops for report in runs[0]])
    assert {"rewards/accuracy", "rewards/margin"} <= set(runs[0][1].figures)
    assert runs[1][1].loss == pytest.approx(runs[0][1].loss, **NEAR)


#: loss to expect beside that of float32: bfloat16 rounds each product by 2^-9, a score of tens by some hundredths, beta
#: is 0.1; a compiled block sums in another order
HOW = [
    ({"activation_checkpointing": "full"}, 0.0),
    ({"precision": "bf16"}, 2e-3),
    ({"precision": "bf16", "activation_checkpointing": "full"}, 2e-3),
    pytest.param({"compile": "blocks"}, 1e-5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "noise"), HOW, ids=str)
def test_how_blocks_run_changes_no_loss_beside_a_live_reference(
    changes: dict[str, Any], noise: float, tmp_path: Path
) -> None:
    if "compile" in changes and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    plain, other = (
        run(dataclasses.replace(pair_job(tmp_path, pair_config(steps=3, **how), work), companion=live(tmp_path)))
        for work, how in (("plain", {}), ("other", changes))
    )
    for found, expected in zip(other, plain, strict=True):
        assert found.loss == (None if expected.loss is None else pytest.approx(expected.loss, rel=0, abs=noise))
        assert found.held_out == (expected.held_out and pytest.approx(expected.held_out, rel=0, abs=noise))
    # policy and reference run the same way: no rounding stands between them
    assert other[0].held_out == plain[0].held_out
    frozen = [report.hardware_flops - report.model_flops for report in plain[1:]]
    assert min(frozen) > 0
    if changes.get("activation_checkpointing") == "full":  # the reference has no backward to run again for
        again = [report.hardware_flops - report.model_flops for report in other[1:]]
        forward_of_blocks = [more - once for more, once in zip(again, frozen, strict=True)]
        assert all(0 < more < once for more, once in zip(forward_of_blocks, frozen, strict=True))


def test_a_pair_whose_loss_is_not_finite_is_named(tmp_path: Path) -> None:
    """Its reference says that the rejected answer cannot be: the table is of another hand than ours, which refuses."""
    bad, job = 2 * 17 + 1, pair_job(tmp_path, pair_config(steps=30, incidents={"non_finite": "skip"}))
    tables = {}
    for split in ("train", "held_out"):
        store, tables[split] = TokenStore(tmp_path / split), str(tmp_path / f"said-{split}")
        writer = SignalWriter(tables[split], store, "example", {"logprob": (np.float32, ())}, {})
        for example in range(len(store)):
            writer.put(example, {"logprob": np.float32("-inf" if (split, example) == ("train", bad) else -20.0)})
        writer.close()
    reports = run(dataclasses.replace(job, companion=Companion("stored", tables=tables)))
    entries = read_log(tmp_path / "work/incidents.jsonl")  # once a pass over the data
    assert entries and reports[-1].incidents == len(entries) < 5
    for entry in entries:
        assert entry["suspects"] == ["tools: row:17"] and "tools: row:17" in entry["rows"]
    assert sum("skipped" in report.event for report in reports) == len(entries)


def test_a_reference_that_gives_no_probability_is_refused(tmp_path: Path) -> None:
    pair_job(tmp_path, pair_config())
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    store = TokenStore(tmp_path / "train")
    with pytest.raises(ModelError, match="no log-probability") as refused:
        store_document_logprobs(model, store, tmp_path / "said", {}, row_tokens=ROW_TOKENS)
    assert "row:" in str(refused.value.where) and not (tmp_path / "said/signals.json").exists()


def test_a_reference_that_cannot_share_beginnings_decides_for_both(tmp_path: Path) -> None:
    """Linear attention has one past for each token. The held-out pairs are laid out for both models."""
    write_tiny_model("qwen3_next", tmp_path / "reference")
    job = pair_job(tmp_path, pair_config(steps=2, share_prefixes=True), companion=live(tmp_path, "reference"))
    with pytest.raises(ConfigError, match="linear attention"):
        run(job)
    reports = run(dataclasses.replace(job, train=pair_config(steps=2, share_prefixes=False)))
    assert reports[-1].held_out is not None and math.isfinite(reports[-1].held_out["all"])
