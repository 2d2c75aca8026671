"""What a person sees while training runs."""

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.load import build_run_config
from posttrain_lib.rl.figures import MEASURES
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.tracking.terminal import ProgressLine
from steps.base import StepContext
from steps.train import _bring_checkpoints, _finite, summary, throughput
from steps.watch import watch
from tests.oracles.tiny_job import make_job, tiny_config
from tests.unit.training.test_loop import run

REPORT = StepReport(
    step=5, total_steps=10, loss=1.25, lr=0.1, grad_norm=1.0, trained_weight=50.0, real_tokens=90, slot_tokens=100,
    tokens_seen=450, step_seconds=0.5, data_wait_seconds=0.05, model_flops=1e12, mfu=None, peak_memory_gib=1.0,
)  # fmt: skip


def test_a_line_has_loss_speed_fill_and_bar() -> None:
    line = ProgressLine(every_seconds=0.0).line(REPORT)
    assert line is not None
    assert line.startswith("[##########..........] 5/10")
    for part in ("loss 1.2500", "180 tok/s", "fill 0.900"):
        assert part in line
    assert "MFU" not in line


def test_mfu_only_where_a_peak_is_known() -> None:
    assert "MFU 41.5%" in (ProgressLine(every_seconds=0.0).line(replace(REPORT, mfu=0.415)) or "")


def test_quiet_between_lines_but_never_about_events() -> None:
    bar = ProgressLine(every_seconds=1000.0)
    assert bar.line(REPORT) is not None
    assert bar.line(replace(REPORT, step=6)) is None
    assert "held-out 2.0000" in (bar.line(replace(REPORT, step=7, held_out={"all": 2.0})) or "")
    assert "(resumed)" in (bar.line(replace(REPORT, step=8, event="resumed")) or "")
    assert bar.line(replace(REPORT, step=10)) is not None


def test_step_zero_shows_no_loss() -> None:
    line = ProgressLine(every_seconds=0.0).line(replace(REPORT, step=0, loss=None, held_out={"all": 6.0}))
    assert line == "[....................] 0/10  held-out 6.0000"


def test_eta_is_the_rate_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 8.0])
    monkeypatch.setattr("posttrain_lib.tracking.terminal.time.monotonic", lambda: next(clock))
    bar = ProgressLine(every_seconds=0.0)
    bar.line(replace(REPORT, step=0, loss=None))
    bar.line(replace(REPORT, step=1))
    assert "ETA 1:12" in (bar.line(replace(REPORT, step=1)) or "")  # 9 steps at 8 s


def test_throughput_leaves_out_step_zero_and_the_first_step() -> None:
    slow = replace(REPORT, step=1, step_seconds=100.0)
    figures = throughput([replace(REPORT, step=0), slow, replace(REPORT, step=2), replace(REPORT, step=3)])
    assert figures["tokens_per_second"] == pytest.approx(180.0)
    assert figures["data_wait_share"] == pytest.approx(0.1)
    assert figures["fill"] == pytest.approx(0.9)


RESULT = TrainResult(
    step=2, tokens_seen=9, last_checkpoint="c", best_checkpoint="c", best_held_out=6.4052, first_held_out=6.5,
    stopped_early=False,
)  # fmt: skip


def test_the_summary_says_what_was_reached() -> None:
    assert summary(RESULT) == "2 steps; best held-out loss 6.4052"
    assert summary(replace(RESULT, best_held_out=None, stopped_early=True)) == "2 steps (stopped early)"


def test_the_check_counts_steps_and_not_the_look_before_them() -> None:
    assert _finite(RESULT, [replace(REPORT, step=step) for step in range(3)]).value == RESULT.step


def test_the_summary_says_where_training_made_it_worse() -> None:
    said = summary(replace(RESULT, first_held_out=6.3856))
    assert said == "2 steps; best held-out loss 6.4052, worse than the 6.3856 before training"
    said = summary(replace(RESULT, best_held_out=-0.125, first_held_out=-0.594, held_out_is=MEASURES["reward"]))
    assert "best held-out reward with its sign changed -0.1250, worse than the -0.5940 before training" in said


def test_the_summary_says_where_the_data_ended() -> None:
    end = "the data ends after 2 of the 40 steps asked for (good: 10 examples)"
    assert summary(replace(RESULT, data_end=end)) == f"2 steps; {end}; best held-out loss 6.4052"


def test_a_run_whose_checkpoints_are_gone_says_so(tmp_path: Path) -> None:
    """Steps are known, and training begins again at 0: not between other things in a progress line."""

    def reports(first: int) -> Iterator[StepReport]:
        for step in range(first, 3):
            yield replace(REPORT, step=step, total_steps=2)
        return RESULT

    config = build_run_config({
        "name": "test",
        "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
        "model": {"path": "folder"},
        "train": {"steps": 2, "row_tokens": 64},
    })  # fmt: skip
    said: list[str] = []
    context = StepContext(config, {}, tmp_path / "out", tmp_path, said.append, lambda _: None)
    for first, told in ((0, False), (1, False), (0, True)):
        said.clear()
        watch(reports(first), context)
        assert any("WARNING" in line and "step 2" in line for line in said) == told


@pytest.mark.parametrize("links", [True, False])
def test_what_is_killed_before_it_is_published_has_not_lost_its_checkpoints(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of a large result take minutes, and all that the step made besides its work folder goes with it."""
    job = make_job(tmp_path, tiny_config(steps=2))
    _, result = run(job)
    assert result is not None
    if not links:
        monkeypatch.setattr("os.link", refused)
    (tmp_path / "out").mkdir()
    _bring_checkpoints(result, tmp_path / "out/checkpoints")
    last = tmp_path / "out/checkpoints" / Path(result.last_checkpoint).name
    assert load_model_state(last).keys() == load_model_state(result.last_checkpoint).keys()
    shutil.rmtree(tmp_path / "out")
    reports, again = run(job)
    assert again == result and [report.step for report in reports] == [2]


def refused(*_: object) -> None:
    raise OSError(errno.EPERM, "no links here")
