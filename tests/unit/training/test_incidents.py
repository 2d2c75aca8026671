"""What a step that went wrong leads to: stop, skip or roll back; logged, bounded, and the same when resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.train import Incidents
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import TrainingError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.base import Loss, LossOutput
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.training.incidents import LEAST, IncidentPolicy, StepIncident, incident, read_log
from posttrain_lib.training.loop import train
from posttrain_lib.training.state import Progress
from tests.oracles.tiny_job import make_job, tiny_config
from tests.unit.training.test_loop import run

#: store index of the row that spoils whatever step it is in
POISON = 17


class Poisoned(Loss):
    """A user's loss that the row :data:`POISON` multiplies by ``factor``."""

    def __init__(self, factor: float = math.inf) -> None:
        self.factor = factor
        self.inner = build_loss("sft")

    def divisor(self, batch: PackedBatch) -> float:
        return self.inner.divisor(batch)

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = self.inner(model, batch)
        places = torch.searchsorted(batch.cu_seqlens, batch.supervised_index.to(torch.int32), right=True) - 1
        bad_N = torch.as_tensor(batch.document_ids)[places] == POISON
        if not (bad_N.any() and torch.is_grad_enabled()):  # the held-out rows have a number 17, too
            return output
        values = output.values.where(~bad_N, output.values * self.factor)
        return dataclasses.replace(output, local_sum=output.local_sum * self.factor, values=values)


def config(incidents: dict, steps: int = 8, factor: float = math.inf, **changes: object):
    loss = {"loss": "tests.unit.training.test_incidents:Poisoned", "loss_options": {"factor": factor}}
    return tiny_config(steps=steps, incidents=incidents, **loss, **changes)


def named(store: TokenStore) -> str:
    """The poisoned row, as errors and logs name it."""
    return f"{store.sources[int(store.source_index[POISON])]}: {store.row_id(POISON)}"


def bits(path: str) -> dict[str, torch.Tensor]:
    return load_model_state(path)


@pytest.fixture(scope="module")
def bad_step(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The step that the poisoned row is in."""
    folder = tmp_path_factory.mktemp("where")
    with pytest.raises(StepIncident):
        run(make_job(folder, config({})))
    return int(read_log(folder / "work/incidents.jsonl")[0]["data_step"])


def test_by_default_it_stops_and_tells_the_row(tmp_path: Path, bad_step: int) -> None:
    with pytest.raises(TrainingError, match=f"loss of step {bad_step} is not finite") as stopped:
        run(make_job(tmp_path, config({})))
    assert f"row:{POISON}" in str(stopped.value.where)
    (entry,) = read_log(tmp_path / "work/incidents.jsonl")
    assert (entry["action"], entry["kind"], entry["value"]) == ("stop", "non_finite", "inf")
    store = TokenStore(tmp_path / "train")
    assert entry["suspects"] == [named(store)]
    assert named(store) in entry["rows"] and len(entry["rows"]) > 5


def test_a_skipped_step_takes_no_part(tmp_path: Path, bad_step: int) -> None:
    """Weights after it are those before it; number, rate and data go on."""
    every = {"checkpoint": {"every_steps": 1, "keep_last": 9}}
    reports, result = run(make_job(tmp_path, config({"non_finite": "skip"}, **every)))
    assert result is not None and result.step == 8 and result.incidents == reports[-1].incidents == 1
    skipped = reports[bad_step]
    assert (skipped.loss, skipped.grad_norm) == (None, 0.0)
    assert skipped.event.startswith(f"skipped: the loss of step {bad_step} is not finite")
    assert all(report.loss is not None for report in reports[1:] if report is not skipped)
    folder = Path(result.last_checkpoint).parent
    before, after = bits(str(folder / f"step-{bad_step - 1:08d}")), bits(str(folder / f"step-{bad_step:08d}"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [entry["action"] for entry in read_log(tmp_path / "work/incidents.jsonl")] == ["skip"]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_resumed_after_an_incident_is_uninterrupted_bit_for_bit(tmp_path: Path, bad_step: int, action: str) -> None:
    """Cut before, at and behind the step that goes wrong."""
    settings = config({"non_finite": action}, steps=9, checkpoint={"every_steps": 2, "keep_last": 2})
    whole, result = run(make_job(tmp_path, settings, work="whole"))
    assert result is not None and result.incidents == 1
    cuts = {bad_step - 1, bad_step, bad_step + 1} & set(range(1, len(whole) - 1))
    for cut in sorted(cuts):
        work = f"cut-{cut}"
        events = train(make_job(tmp_path, settings, work=work))
        for _ in range(cut + 1):
            next(events)
        events.close()
        resumed, again = run(make_job(tmp_path, settings, work=work))
        assert again is not None and (again.step, again.incidents) == (result.step, 1)
        one, other = bits(result.last_checkpoint), bits(again.last_checkpoint)
        assert all(torch.equal(one[name], other[name]) for name in one), cut
        assert resumed[-1].loss == whole[-1].loss
        assert len(read_log(tmp_path / work / "incidents.jsonl")) == 1, "logged once, however often it is met"


def test_rolling_back_leaves_the_data_since_the_checkpoint_out(tmp_path: Path, bad_step: int) -> None:
    """The losses are those of a run that never had those rows: the same weights, and the data behind the step."""
    every = bad_step  # the last checkpoint before the step that goes wrong is the one before training
    settings = config({"non_finite": "roll_back"}, steps=6, checkpoint={"every_steps": every, "keep_last": 2})
    reports, result = run(make_job(tmp_path, settings))
    back = next(number for number, report in enumerate(reports) if "rolled back" in report.event)
    assert back == bad_step and reports[back].step == 0 and reports[back].loss is None
    assert [report.step for report in reports[back:]] == [0, 1, 2, 3, 4, 5, 6]
    assert result is not None and result.step == 6
    clean, _ = run(make_job(tmp_path, tiny_config(steps=bad_step + 1), work="clean"))
    assert reports[back + 1].source_tokens == clean[bad_step + 1].source_tokens, "the step behind the one left out"
    assert reports[back + 1].lr == reports[1].lr


def test_a_run_whose_data_ended_before_its_steps_is_over_when_it_is_resumed(tmp_path: Path) -> None:
    """What was left out with a step that went wrong is missing at the end of the epoch."""
    settings = config({"non_finite": "roll_back"}, steps=None, epochs=1)
    reports, result = run(make_job(tmp_path, settings))
    assert result is not None and result.step < reports[0].total_steps
    resumed, again = run(make_job(tmp_path, settings))
    assert again == result
    assert [report.step for report in resumed] == [result.step]


def test_a_run_that_stopped_goes_on_under_another_policy(tmp_path: Path, bad_step: int) -> None:
    """From its last checkpoint, as the run that had that policy from its beginning."""
    every = {"checkpoint": {"every_steps": 1, "keep_last": 2}}
    with pytest.raises(StepIncident):
        run(make_job(tmp_path, config({}, **every)))
    resumed, result = run(make_job(tmp_path, config({"non_finite": "skip"}, **every)))
    whole, other = run(make_job(tmp_path, config({"non_finite": "skip"}, **every), work="whole"))
    assert resumed[0].event.startswith("resumed") and resumed[0].step == bad_step - 1
    assert result is not None and other is not None
    one, two = bits(result.last_checkpoint), bits(other.last_checkpoint)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed[-1].loss == whole[-1].loss


def test_too_many_incidents_stop(tmp_path: Path) -> None:
    """Two epochs meet the row twice."""
    settings = config({"non_finite": "skip", "most": 1}, steps=None, epochs=2)
    with pytest.raises(TrainingError, match="too many steps went wrong") as stopped:
        run(make_job(tmp_path, settings))
    assert "at most 1 (train.incidents.most)" in str(stopped.value.expected)
    log = read_log(tmp_path / "work/incidents.jsonl")
    assert [entry["action"] for entry in log] == ["skip", "stop"]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_a_spike_is_told_from_the_steps_before_it(tmp_path: Path, action: str) -> None:
    incidents = {"spike": action, "window": 8, "most": 4}
    settings = config(incidents, steps=24, factor=50.0, optimizer={"lr": 1e-3})
    reports, result = run(make_job(tmp_path, settings))
    log = read_log(tmp_path / "work/incidents.jsonl")
    assert result is not None and result.incidents == len(log) >= 1
    assert all(entry["data_step"] > LEAST and entry["kind"] == "spike" for entry in log)
    store = TokenStore(tmp_path / "train")
    assert all(entry["suspects"][0] == named(store) for entry in log), "the row of the highest loss comes first"
    assert any(("rolled back" if action == "roll_back" else "skipped") in report.event for report in reports)


def test_a_spike_can_stop(tmp_path: Path) -> None:
    settings = config({"spike": "stop", "window": 8}, steps=24, factor=50.0, optimizer={"lr": 1e-3})
    with pytest.raises(TrainingError, match="is a spike; the optimiser step was not taken") as stopped:
        run(make_job(tmp_path, settings))
    assert "deviations above the median of 8 steps" in str(stopped.value.expected)


def policy(**changes: object) -> IncidentPolicy:
    return IncidentPolicy(
        Incidents.model_validate({"spike": "skip", "window": 16, **changes}), Path("incidents.jsonl"), writes=False
    )


def steps(count: int) -> Iterator[float]:
    """A falling curve with some noise, always the same."""
    return (3.0 - 0.02 * number + 0.05 * math.sin(7.0 * number) for number in range(count))


def test_what_counts_as_a_spike() -> None:
    judge, progress = policy(), Progress()
    for number, loss in enumerate(steps(40)):
        assert judge.spike(progress, loss, 1.0) is None, number
        judge.accept(progress, loss, 1.0)
    assert len(progress.recent_losses) == len(progress.recent_norms) == 16
    assert judge.spike(progress, 3.0, 1.0) is None, "within ten deviations of a window that falls"
    found = judge.spike(progress, 6.0, 1.0)
    assert found is not None and found[:2] == ("loss", 6.0)
    found = judge.spike(progress, 2.2, 10.5)
    assert found is not None and found[:2] == ("gradient norm", 10.5)
    assert judge.spike(progress, 2.2, 9.5) is None
    assert judge.spike(progress, 0.0, 0.0) is None, "a fall is none"


def test_a_flat_curve_has_room_for_its_noise() -> None:
    judge, progress = policy(), Progress()
    for _ in range(16):
        judge.accept(progress, 2.0, 1.0)
    assert judge.spike(progress, 2.15, 1.0) is None, "below ten times one per cent"
    assert judge.spike(progress, 2.3, 1.0) is not None


def test_nothing_is_kept_where_spikes_are_not_looked_for() -> None:
    judge, progress = policy(spike="off"), Progress()
    for loss in steps(20):
        judge.accept(progress, loss, 1.0)
    assert judge.spike(progress, 1e9, 1e9) is None and not progress.recent_losses


def test_a_torn_line_of_the_log_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "incidents.jsonl"
    log.write_text('{"data_step": 1, "ki')
    found = incident("non_finite", "loss", math.inf, 3, ["a: 1"])
    judge = IncidentPolicy(Incidents(non_finite="skip"), log)
    assert judge.decide(found, Progress(), 3) == "skip"
    assert [entry["data_step"] for entry in read_log(log)] == [3]


def test_an_incident_survives_the_way_to_the_driver() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(incident("non_finite", "loss", math.inf, 3, ["a: 1"])))
    assert isinstance(again, StepIncident) and again.where == "step 3, rows a: 1"
