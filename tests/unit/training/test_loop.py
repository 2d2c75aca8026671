"""The loop: reports, evaluation, best and last checkpoint, early stopping, epochs, resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.data.loader import count_steps, held_out_batches
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import CheckpointError, ConfigError, DataError, TrainingError
from posttrain_lib.evaluation.perplexity import held_out_loss
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.base import Loss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training import pulse
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import SOURCES, VOCABULARY, make_job, tiny_config, write_store


def run(job: TrainJob, stop_after: int | None = None) -> tuple[list[StepReport], TrainResult | None]:
    """Drain the generator; ``stop_after`` closes it after that step, as a caller that goes away does."""
    events, reports = train(job), []
    while True:
        try:
            reports.append(next(events))
        except StopIteration as end:
            return reports, end.value
        if reports[-1].step == stop_after:
            events.close()
            return reports, None


def test_reports_and_result(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=6))
    reports, result = run(job)
    assert [report.step for report in reports] == list(range(7))
    assert {report.total_steps for report in reports} == {6}
    first, last = reports[0], reports[-1]
    assert (first.loss, first.real_tokens, first.event) == (None, 0, "")
    assert [report.step for report in reports if report.held_out] == [0, 3, 6]
    assert set(last.held_out) == {"all", *SOURCES}
    assert set(last.source_loss) == set(SOURCES)
    for report in reports[1:]:
        assert 0 < report.real_tokens <= report.slot_tokens == 8 * 32
        assert 0 <= report.data_wait_seconds <= report.step_seconds
        assert report.model_flops > 0
        # a CPU has no data sheet: both are shares of the product that was measured
        assert report.mfu == report.mfu_measured == report.hfu > 0
        assert 0 < report.trained_tokens < report.real_tokens
        assert report.peak_memory_gib > 0
    assert last.tokens_seen == sum(report.real_tokens for report in reports)
    assert last.event == "best, checkpoint, finished"
    assert [report.step for report in reports if "checkpoint" in report.event] == [2, 3, 4, 6]
    assert result.step == 6
    assert result.first_held_out == first.held_out["all"]
    assert result.best_held_out == min(report.held_out["all"] for report in reports[1:] if report.held_out)
    assert Path(result.last_checkpoint).name == "step-00000006"
    json.dumps([dataclasses.asdict(report) for report in reports], allow_nan=False)


def test_a_long_look_at_held_out_rows_and_a_step_of_many_micro_batches_move(tmp_path: Path) -> None:
    """A watchdog takes a rank whose pulse stands still for hung, however much it has to do."""
    job = make_job(tmp_path, tiny_config(steps=2, micro_batch_rows=1))
    batches = list(held_out_batches(TokenStore(Path(job.held_out_store)), row_tokens=32))
    pulse.begin()
    beats = []
    for _ in train(job):
        beats.append(pulse.current().beats)
    assert len(batches) > 3
    assert beats[0] >= len(batches)
    assert beats[1] - beats[0] >= 8, "rows of a step, each a micro-batch"


def test_held_out_loss_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=3))
    reports, result = run(job)
    spec = spec_from_folder(job.model_folder)
    model, store = build_model(spec), TokenStore(tmp_path / "held_out")
    load_hf_weights(model, spec, job.model_folder)
    # other rows, so other sums: float32 rounding only
    before = held_out_loss(model, build_loss("sft"), store, row_tokens=64, batch_rows=3).losses
    assert before == pytest.approx(reports[0].held_out, rel=1e-6)
    model.load_state_dict(load_model_state(result.last_checkpoint))
    after = held_out_loss(model, build_loss("sft"), store, row_tokens=64).losses
    assert after == pytest.approx(reports[-1].held_out, rel=1e-6)


def test_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    # A rate far too high for the last steps: held-out loss turns, the best lies behind.
    config = tiny_config(
        steps=12,
        evaluate_every_steps=2,
        checkpoint={"every_steps": 1, "keep_last": 1},
        optimizer={"lr": 0.3},
        schedule={"name": "constant", "warmup_steps": 12},
    )
    reports, result = run(make_job(tmp_path, config))
    losses = {report.step: report.held_out["all"] for report in reports if report.held_out and report.step}
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "the run must get worse at its end for this test to mean anything"
    assert result.best_checkpoint.endswith(f"step-{best:08d}")
    kept = sorted(path.name for path in (tmp_path / "work/checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000012"]
    assert set(load_model_state(result.best_checkpoint)) == set(load_model_state(result.last_checkpoint))


def test_early_stopping(tmp_path: Path) -> None:
    config = tiny_config(
        steps=40,
        evaluate_every_steps=1,
        early_stopping={"patience": 2, "min_delta": 100.0},  # nothing improves by that much
    )
    reports, result = run(make_job(tmp_path, config))
    assert result.stopped_early
    assert result.step == reports[-1].step == 2
    assert "early_stop" in reports[-1].event
    assert "finished" in reports[-1].event
    again, same = run(make_job(tmp_path, config))
    assert same == result, "a finished job has nothing left to do"
    assert [report.step for report in again] == [2]


@pytest.mark.parametrize("patience", [None, {"patience": 4, "min_delta": 100.0}])
def test_a_run_that_stopped_early_goes_on_under_more_patience(tmp_path: Path, patience: dict | None) -> None:
    """Early stopping may change in the middle of a run; the weights are those of a run that had it from the start."""
    steps, impatient = {"steps": 6, "evaluate_every_steps": 1}, {"patience": 2, "min_delta": 100.0}
    _, stopped = run(make_job(tmp_path, tiny_config(**steps, early_stopping=impatient)))
    assert stopped is not None and stopped.stopped_early and stopped.step == 2
    resumed, result = run(make_job(tmp_path, tiny_config(**steps, early_stopping=patience)))
    _, whole = run(make_job(tmp_path, tiny_config(**steps, early_stopping=patience), work="whole"))
    assert result is not None and whole is not None
    assert (resumed[0].step, result.step, result.stopped_early) == (2, whole.step, patience is not None)
    one, other = (load_model_state(found.last_checkpoint) for found in (result, whole))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())


def test_epochs_decide_the_steps(tmp_path: Path) -> None:
    config = tiny_config(steps=None, epochs=1.5)
    reports, result = run(make_job(tmp_path, config))
    store = TokenStore(tmp_path / "train")
    feed = StoreFeed(store, row_tokens=32, epochs=1.5)
    expected = count_steps(feed, row_tokens=32, rows_per_step=8, packing_buffer=16)
    assert result.step == expected == reports[-1].total_steps
    examples = int(store.lengths.sum())
    assert 1.3 * examples < result.tokens_seen < 1.7 * examples


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"activation_checkpointing": "full"}])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    config = tiny_config(steps=7, **changes)
    whole, result = run(make_job(tmp_path, config, work="whole"))
    run(make_job(tmp_path, config, work="cut"), stop_after=5)
    resumed, second = run(make_job(tmp_path, config, work="cut"))
    assert resumed[0].step == 4
    assert resumed[0].event.startswith("resumed")
    assert [report.step for report in resumed] == [4, 5, 6, 7]
    for before, after in zip(whole[4:], resumed, strict=True):
        assert (before.loss, before.grad_norm, before.lr) == (after.loss, after.grad_norm, after.lr)
        assert (before.held_out, before.source_loss) == (after.held_out, after.source_loss)
        assert before.tokens_seen == after.tokens_seen
    one, other = load_model_state(result.last_checkpoint), load_model_state(second.last_checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert dataclasses.replace(result, last_checkpoint="", best_checkpoint="") == dataclasses.replace(
        second, last_checkpoint="", best_checkpoint=""
    )


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    config = tiny_config(steps=6)
    whole, _ = run(make_job(tmp_path, config, work="whole"))
    run(make_job(tmp_path, config, work="cut"), stop_after=5)
    newest = tmp_path / "cut/checkpoints/step-00000004"
    shard = newest / "tensors-0.bin"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    shard.write_bytes(content)
    resumed, _ = run(make_job(tmp_path, config, work="cut"))
    assert resumed[0].step == 3
    assert "skipped checkpoint step-00000004: tensors-0.bin is damaged: bytes " in resumed[0].event
    assert [report.loss for report in resumed] == [report.loss for report in whole[3:]]


def test_only_torn_checkpoints_start_anew_and_say_so(tmp_path: Path) -> None:
    config = tiny_config(steps=2)
    run(make_job(tmp_path, config))
    (tmp_path / "work/checkpoints/step-00000002/manifest.json").unlink()
    again, result = run(make_job(tmp_path, config))
    assert [report.step for report in again] == [0, 1, 2]
    assert again[0].event == "skipped checkpoint step-00000002: manifest.json is missing"
    assert load_model_state(result.last_checkpoint)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(make_job(tmp_path, tiny_config(steps=2)))
    with pytest.raises(CheckpointError, match="optimizer differs"):
        run(make_job(tmp_path, tiny_config(steps=2, optimizer={"lr": 0.5})))
    shutil.rmtree(tmp_path / "train")
    write_store(tmp_path / "train", 100, seed=9)
    with pytest.raises(CheckpointError, match="store differs"):
        run(make_job(tmp_path, tiny_config(steps=2)))


def test_a_diverging_run_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(
        steps=50, clip_norm=None, optimizer={"name": "sgd", "lr": 1e30}, schedule={"name": "constant"},
        evaluate_every_steps=50, checkpoint={"every_steps": 1},
    )  # fmt: skip
    with pytest.raises(TrainingError, match="of step 2 is not finite") as caught:
        run(make_job(tmp_path, config))
    assert "row:" in str(caught.value.where)
    assert [path.name for path in (tmp_path / "work/checkpoints").iterdir()] == ["step-00000001"]


class LastTokensLoss(Loss):
    """A user's own loss, found by its name in the run file."""

    def __init__(self, scale: float = 1.0) -> None:
        self.inner, self.scale = build_loss("sft"), scale

    def divisor(self, batch: object) -> float:
        return self.scale * self.inner.divisor(batch)

    def __call__(self, model: object, batch: object) -> object:
        output = self.inner(model, batch)
        return dataclasses.replace(output, local_sum=self.scale * output.local_sum)


def test_a_loss_from_outside_with_a_divisor_of_its_own(tmp_path: Path) -> None:
    plain, _ = run(make_job(tmp_path, tiny_config(steps=3), work="plain"))
    config = tiny_config(steps=3, loss="tests.unit.training.test_loop:LastTokensLoss", loss_options={"scale": 4.0})
    scaled, _ = run(make_job(tmp_path, config, work="scaled"))
    # a power of two: exact
    assert [report.loss for report in scaled] == [report.loss for report in plain]


class LongestLoss(LastTokensLoss):
    """Plain SFT that reports its dearest token."""

    extremes = ("dearest",)

    def __call__(self, model: object, batch: object) -> object:
        output = super().__call__(model, batch)
        return dataclasses.replace(output, extremes={"dearest": output.values.max().double()})


def test_the_largest_value_that_a_loss_reports_is_in_the_report(tmp_path: Path) -> None:
    config = tiny_config(steps=2, loss="tests.unit.training.test_loop:LongestLoss")
    reports, _ = run(make_job(tmp_path, config))
    assert all(report.figures["dearest"] > report.loss for report in reports[1:])


def test_a_source_called_as_the_mean_over_all_is_refused(tmp_path: Path) -> None:
    """Its held-out loss would stand in the place of the one that picks the best checkpoint."""
    job = make_job(tmp_path, tiny_config(steps=2))
    shutil.rmtree(tmp_path / "held_out")
    with TokenStoreWriter(tmp_path / "held_out") as writer:
        for source in ("all", SOURCES[0]):
            writer.add(TokenizedExample(np.arange(6, dtype=np.int32), np.ones(6, np.float32), source, "row:0"))
    with pytest.raises(ConfigError, match="name of the mean over all sources"):
        run(job)


def test_threads_and_determinism_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    run(make_job(tmp_path, tiny_config(steps=1, schedule={}), threads=before[0] + 1))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=None, epochs=1.0, schedule={"name": "constant", "warmup_steps": 10_000}))
    with pytest.raises(ConfigError, match="warm-up is longer"):
        run(job)


def test_ids_that_the_model_does_not_know_are_refused_before_the_first_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=2))
    with TokenStoreWriter(tmp_path / "foreign") as writer:
        tokens = np.array([1, VOCABULARY, 2], np.int32)
        writer.add(TokenizedExample(tokens, np.ones(3, np.float32), SOURCES[0], "row:0"))
    with pytest.raises(DataError, match="does not know") as caught:
        run(dataclasses.replace(job, train_store=str(tmp_path / "foreign")))
    assert f"largest id {VOCABULARY}" in str(caught.value)


def test_pairs_are_no_data_for_sft(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config())
    shutil.rmtree(tmp_path / "train")
    ones = np.ones(6, np.float32)
    with TokenStoreWriter(tmp_path / "train") as writer:
        for name in ("r#chosen", "r#rejected"):
            writer.add(TokenizedExample(np.arange(6, dtype=np.int32), ones, "chat", name), kind="pair", row=(0, 0))
    with pytest.raises(DataError, match="not of the kind"):
        run(job)


def test_a_mixture_that_ends_first_ends_the_run(tmp_path: Path) -> None:
    mixture = {"exhausted": "drop", "sources": {name: {"epochs": 1} for name in SOURCES}}
    reports, result = run(make_job(tmp_path, tiny_config(steps=10_000, mixture=mixture)))
    assert result.step == reports[-1].step == reports[-1].total_steps < 10_000
    assert "finished" in reports[-1].event and reports[-1].held_out is not None
    counts = np.bincount(TokenStore(tmp_path / "train").source_index).tolist()
    given = "; ".join(f"{name}: {count} examples" for name, count in zip(SOURCES, counts, strict=True))
    assert result.data_end == f"the data ends after {result.step} of the 10,000 steps asked for ({given})"
    assert reports[0].event == result.data_end


def test_a_source_that_is_through_before_it_is_faded_out_ends_the_run(tmp_path: Path) -> None:
    """It stops the mixture while it is in it. The plan took it for one that never ends, the end for a fault."""
    fading: dict[str, Any] = {"weight": [[1, 1.0], [10_000, 0.0]], "exhausted": "stop"}
    mixture = {"sources": {SOURCES[0]: fading, SOURCES[1]: {"weight": 1.0}}}
    reports, result = run(make_job(tmp_path, tiny_config(steps=10_000, mixture=mixture)))
    assert result.step == reports[-1].total_steps < 10_000 and "finished" in reports[-1].event
    assert result.data_end.startswith(f"the data ends after {result.step} of the 10,000 steps asked for")
    fading["weight"] = [[1, 1.0], [3, 0.0]]  # and one that is not
    _, whole = run(make_job(tmp_path, tiny_config(steps=10, mixture=mixture), work="whole"))
    assert whole.step == 10 and not whole.data_end


def test_a_cap_on_a_source_is_what_there_is_of_it(tmp_path: Path) -> None:
    caps = {name: {"max_examples": 25, "epochs": 2} for name in SOURCES}
    _, result = run(make_job(tmp_path, tiny_config(steps=40, mixture={"exhausted": "drop", "sources": caps})))
    assert f"{SOURCES[0]}: 25 examples, 2 times" in result.data_end


def test_nothing_is_said_where_the_data_lasts(tmp_path: Path) -> None:
    reports, result = run(make_job(tmp_path, tiny_config(steps=2)))
    assert (reports[0].event, result.data_end) == ("", "")
