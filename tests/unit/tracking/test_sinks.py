"""Sinks: each step once, whatever a host does; and the real hosts, offline, read back."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from posttrain_lib.config.tracking import Tracker
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.tracking.build import build_sinks
from posttrain_lib.tracking.figures import figures, flat
from posttrain_lib.tracking.sinks import JsonLines, RunFacts, Sink, Sinks
from posttrain_lib.tracking.terminal import ProgressLine, Terminal

REPORT = StepReport(
    step=1, total_steps=4, loss=1.25, lr=0.1, grad_norm=1.0, trained_weight=50.0, real_tokens=90, slot_tokens=100,
    tokens_seen=90, step_seconds=0.5, data_wait_seconds=0.05, model_flops=1e12, mfu=0.4, peak_memory_gib=1.0,
    trained_tokens=45, hardware_flops=1.2e12, mfu_measured=0.5, hfu=0.48, seconds={"forward": 0.2, "other": 0.3},
    seconds_of_step=1, memory_gib={"weights": 0.5}, source_loss={"a b&c": 1.25},
)  # fmt: skip
FACTS = RunFacts("small", "0123456789abcdef", {"train": {"steps": 4}, "sources": ["a"]})


def at(step: int, **changes: Any) -> StepReport:
    return replace(REPORT, step=step, loss=None if step == 0 else 2.0 - step / 10, **changes)


class Recorder:
    """A host that remembers, and fails where it is told to."""

    name = "recorder"
    repeats = False

    def __init__(self, fail: str = "", at_step: int = -1) -> None:
        self.fail, self.at_step = fail, at_step
        self.opened: list[Any] = []
        self.steps: list[int] = []
        self.closed: list[Mapping[str, Any] | None] = []

    def open(self, facts: RunFacts, earlier: Any) -> str:
        self.opened.append(earlier)
        if self.fail == "open":
            raise ConnectionError("no route to the host")
        return "its run"

    def step(self, report: StepReport) -> None:
        if self.fail == "step" and report.step == self.at_step:
            raise OSError("disk full")
        self.steps.append(report.step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.closed.append(summary)
        if self.fail == "close":
            raise TimeoutError("not sent")


def driven(work: Path, *sinks: Sink, steps: range = range(5), said: list[str] | None = None) -> Sinks:
    lines: list[str] = [] if said is None else said
    driver = Sinks(sinks, FACTS, work, lines.append)
    for step in steps:
        driver.step(at(step))
    driver.close({"step": 4})
    return driver


@pytest.mark.parametrize(("fail", "written", "lost"), [("open", 0, 5), ("step", 2, 3), ("close", 5, 0)])
def test_a_sink_that_fails_is_said_once_and_counted_and_stops_nobody(
    tmp_path: Path, fail: str, written: int, lost: int
) -> None:
    bad, good, said = Recorder(fail, at_step=2), Recorder(), list[str]()
    receipt = driven(tmp_path, bad, good, said=said).receipt()
    assert good.steps == [0, 1, 2, 3, 4] and good.closed == [{"step": 4}]
    assert len(said) == 1 and "recorder" in said[0]
    assert [(entry["written"], entry["lost"], bool(entry["error"])) for entry in receipt] == [
        (written, lost, True),
        (5, 0, False),
    ]


def test_a_run_that_goes_on_writes_no_step_twice(tmp_path: Path) -> None:
    first = Recorder()
    killed = Sinks([first], FACTS, tmp_path, print)
    for step in range(4):
        killed.step(at(step))
    again = Recorder()
    driven(tmp_path, again, steps=range(2, 5))  # from the checkpoint of step 2
    assert first.steps == [0, 1, 2, 3] and first.opened == [None]
    assert again.steps == [4] and again.opened == ["its run"]


def test_steps_after_a_roll_back_are_written_under_their_numbers_again(tmp_path: Path) -> None:
    sink = Recorder()
    driver = Sinks([sink], FACTS, tmp_path, print)
    for report in (at(1), at(2), at(1, event="rolled back: loss of step 3"), at(2), at(3)):
        driver.step(report)
    assert sink.steps == [1, 2, 2, 3]


def test_json_lines_have_every_field_and_the_last_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    driven(tmp_path, JsonLines(path), steps=range(3))
    with path.open("a") as file:
        file.write('{"step": 3, "tot')  # a process was killed here
    driven(tmp_path, JsonLines(path), steps=range(2, 4))
    assert JsonLines(path).reports() == [at(step) for step in range(4)]


def test_figures_are_named_by_what_they_are() -> None:
    found = figures(at(1, held_out={"all": 3.0}))
    assert found["loss/train"] == 1.9 and found["loss/held_out/all"] == 3.0 and found["loss/source/a b&c"] == 1.25
    assert found["perf/hfu"] == 0.48 and found["perf/trained_tokens_per_second"] == 90.0
    assert found["perf/seconds/other"] == 0.3 and found["memory/weights_gib"] == 0.5
    assert not [name for name in found for other in found if other.startswith(f"{name}/")]
    assert {name.split("/")[0] for name in found} == {"loss", "optim", "perf", "memory", "data"}
    # before training there is nothing to say of speed
    assert set(figures(at(0, held_out={"all": 3.0}))) == {"loss/held_out/all", "data/tokens_seen", "memory/peak_gib"}
    assert flat(FACTS.config) == {"train.steps": 4, "sources": ["a"]}


def test_figures_of_rollouts_are_no_folders_of_others() -> None:
    """As ``rl.figures`` names them: the reward, and its parts."""
    found = figures(at(0, held_out_figures={"reward": 0.5, "reward/exact": 0.25, "pass@1": 0.25}))
    assert found["held_out/reward"] == 0.5 and found["held_out/reward_exact"] == 0.25
    assert not [name for name in found for other in found if other.startswith(f"{name}/")]


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_stays_and_a_file_whole_lines(tmp_path: Path) -> None:
    said: list[str] = []
    screen = _Screen()
    driven(tmp_path, Terminal(said.append, screen))
    assert not said and "2/4" in screen.getvalue()
    driven(tmp_path, Terminal(said.append, io.StringIO()))
    assert "0/4" in said[0] and said[-1].startswith("[####################] 4/4")


def test_what_is_computed_again_shows_beside_the_models_share() -> None:
    assert "MFU 40.0% (HFU 48.0%)" in ProgressLine().text(REPORT)
    assert "HFU" not in ProgressLine().text(replace(REPORT, hardware_flops=REPORT.model_flops))


def built(**entry: Any) -> Sink:
    (sink,) = build_sinks([TypeAdapter(Tracker).validate_python(entry)])
    return sink


def test_tensorboard_files_hold_every_step_of_both_attempts_once(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    entry = {"to": "tensorboard", "folder": str(tmp_path / "boards")}
    driven(tmp_path, built(**entry), steps=range(3))
    driven(tmp_path, built(**entry), steps=range(1, 5))
    (folder,) = (tmp_path / "boards").iterdir()
    assert folder.name == "small-01234567"
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert read == [(step, pytest.approx(2.0 - step / 10)) for step in range(1, 5)]
    assert {"perf/mfu", "memory/weights_gib", "data/fill"} <= set(events.Tags()["scalars"])


def test_wandb_offline_folders_hold_every_step_of_both_attempts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    entry = {"to": "wandb", "mode": "offline", "folder": str(tmp_path / "w")}
    rows, read = [], set[Path]()
    for steps in (range(3), range(1, 5)):
        assert [receipt["error"] for receipt in driven(tmp_path, built(**entry), steps=steps).receipt()] == [""]
        (new,) = set((tmp_path / "w").rglob("*.wandb")) - read
        assert new.name == "run-0123456789abcdef.wandb"
        rows += _wandb_history(new)
        read.add(new)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["loss/train"] for row in rows[1:]] == [pytest.approx(2.0 - step / 10) for step in range(1, 5)]


def _wandb_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a run that ended. W&B's own process writes them, and may still do so when ``finish`` has returned:
    what comes last is the run's exit code."""
    deadline = time.monotonic() + 60
    while not (records := _wandb_records(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path}: no exit code behind {len(records)} records"
        time.sleep(0.05)
    items = [record.history.item for record in records if record.history.item]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]


def _wandb_records(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(data) for data in _records(path.read_bytes())]  # type: ignore[attr-defined]


def _records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, in which W&B writes: blocks of 32 KiB, pieces behind checksum, length and kind (whole,
    first, middle, last); seven bytes stand before the first."""
    place, held = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # still being written
            return
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def test_mlflow_folder_holds_one_run_with_every_step_of_both_attempts_once(tmp_path: Path) -> None:
    import mlflow

    uri = f"file:{tmp_path / 'mlruns'}"
    one = driven(tmp_path, built(to="mlflow", uri=uri), steps=range(3))
    two = driven(tmp_path, built(to="mlflow", uri=uri), steps=range(1, 5))
    assert [receipt["error"] for driver in (one, two) for receipt in driver.receipt()] == ["", ""]
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("posttrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "4"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(one.step, one.value) for one in history] == [(step, 2.0 - step / 10) for step in range(1, 5)]
    assert "loss/source/a b_c" in run.data.metrics


def test_mlflow_folder_holds_a_run_of_rollouts(tmp_path: Path) -> None:
    """Whose gates and held-out figures have names that MLflow does not take as they are."""
    import mlflow

    uri = f"file:{tmp_path / 'mlruns'}"
    facts = replace(FACTS, config={"gates": {"held_out.pass@1": {"min": 0.5}}})
    driver = Sinks([built(to="mlflow", uri=uri)], facts, tmp_path, print)
    driver.step(at(0, held_out_figures={"reward": 0.5, "reward/exact": 0.25, "pass@1": 0.25}))
    driver.close({"step": 0})
    assert driver.receipt() == [{"to": "mlflow", "written": 1, "lost": 0, "error": ""}]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("posttrain").experiment_id])
    assert run.data.params == {"gates.held_out.pass_1.min": "0.5"}
    assert run.data.metrics["held_out/pass_1"] == 0.25


def test_mlflow_says_how_a_run_ended_where_its_summary_has_no_place(tmp_path: Path) -> None:
    """As with a server's store of files that this machine may not write to."""
    import mlflow

    uri = f"file:{tmp_path / 'mlruns'}"
    driver = Sinks([built(to="mlflow", uri=uri)], FACTS, tmp_path, print)
    driver.step(at(1))
    for folder in (tmp_path / "mlruns").rglob("artifacts"):
        (folder / "summary.json").mkdir()
    driver.close({"step": 1})
    assert driver.receipt()[0]["error"]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("posttrain").experiment_id])
    assert run.info.status == "FINISHED"


def test_a_tracker_that_is_unknown_is_refused_in_the_run_file() -> None:
    with pytest.raises(ValueError, match="tensorboard"):
        TypeAdapter(Tracker).validate_python({"to": "nowhere"})
