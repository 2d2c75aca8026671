"""Whole jobs of rollouts with every real part: they learn, go on bit for bit, and keep account of every prompt."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.errors import ConfigError, RolloutError, TrainingError
from posttrain_lib.rl.figures import MEASURES
from posttrain_lib.rl.ledger import FATES, LEDGER
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.run import ANSWERS, train_on_rollouts
from posttrain_lib.rl.settings import HeldOut
from posttrain_lib.rl.version_log import read_log
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training import pulse
from posttrain_lib.training.job import TrainJob
from tests.support.ledgers import trained_visits
from tests.support.rollout_jobs import rollout_job, write_teacher


@pytest.fixture(autouse=True)
def _fresh_pulse() -> Iterator[None]:
    pulse.begin()
    yield
    pulse.begin()


def run(job: TrainJob) -> tuple[list[StepReport], TrainResult]:
    """All reports, and the result."""
    assert job.rollouts is not None
    reports, events = [], train_on_rollouts(job, job.rollouts)
    while True:
        try:
            reports.append(next(events))
        except StopIteration as stop:
            return reports, stop.value


def killed_after(job: TrainJob, step: int) -> None:
    """Run until a step's report is out, and drop everything."""
    assert job.rollouts is not None
    events = train_on_rollouts(job, job.rollouts)
    for report in events:
        if report.step >= step:
            break
    events.close()


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_model_state(result.last_checkpoint)


def comparable(report: StepReport) -> dict[str, Any]:
    """What must be equal in equal runs: all but clocks and memory."""
    plain = dataclasses.asdict(report)
    figures = {name: value for name, value in plain["figures"].items() if not name.startswith(("time/", "idle/"))}
    names = ("step", "loss", "lr", "grad_norm", "trained_weight", "real_tokens", "tokens_seen", "held_out",
             "held_out_figures", "trained_tokens", "incidents")  # fmt: skip
    return {name: plain[name] for name in names} | {"figures": figures}


def test_a_policy_learns_what_is_rewarded(tmp_path: Path) -> None:
    job = rollout_job(tmp_path, updates=30, save_every=30, train={"optimizer": {"lr": 2e-2}})
    reports, result = run(job)
    rewards = [report.figures["reward/short"] for report in reports[1:]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards
    assert result.step == 30 and [report.step for report in reports] == list(range(31))
    assert all(report.figures["mismatch/kl"] < 1e-6 for report in reports[1:]), "float32 twice, in another order"
    assert all(report.figures["rollout/staleness_max"] == 0 for report in reports[1:])


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, stop: int) -> None:
    changes: dict[str, Any] = {"updates_per_batch": 2, "needs_old": True, "updates": 8}
    whole, result = run(rollout_job(tmp_path, "whole", **changes))
    job = rollout_job(tmp_path, "killed", **changes)
    killed_after(job, stop)
    pulse.begin()
    again, resumed = run(job)
    assert "resumed" in again[0].event or again[0].step == 0
    later = {report.step: report for report in again if "resumed" not in report.event}
    assert later, "nothing was left to do"
    for step, report in later.items():
        assert comparable(report) == comparable(next(one for one in whole if one.step == step))
    one, other = weights(result), weights(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert whole[0].held_out is not None
    assert whole[0].held_out["all"] == result.first_held_out == resumed.first_held_out
    assert result.held_out_is == resumed.held_out_is == MEASURES["reward"]
    visits = trained_visits(read_log(tmp_path / "killed" / LEDGER))
    assert visits == trained_visits(read_log(tmp_path / "whole" / LEDGER)) == list(range(16))
    assert read_log(tmp_path / "killed" / ANSWERS) == read_log(tmp_path / "whole" / ANSWERS)


def test_a_run_goes_on_from_its_checkpoints_alone(tmp_path: Path) -> None:
    """They lie in an object store, and the machine that had the rest is gone."""
    _, result = run(rollout_job(tmp_path, "whole", updates=6))
    changes: dict[str, Any] = {"updates": 6, "train": {"checkpoint": {"folder": "memory://elsewhere"}}}
    killed_after(rollout_job(tmp_path, "work", **changes), 4)
    shutil.rmtree(tmp_path / "work")
    pulse.begin()
    again, resumed = run(rollout_job(tmp_path, "work", **changes))
    assert "ledger.jsonl is not here" in again[0].event and again[0].step > 0
    one, other = weights(result), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, *lines = read_log(tmp_path / "work" / LEDGER)
    before = sum(first["before"].values())
    assert trained_visits(lines) == trained_visits(read_log(tmp_path / "whole" / LEDGER))[before:]


def short_batches(folder: Path, work: str, **changes: Any) -> TrainJob:
    """A job whose batches lose groups that nothing replaces, of three updates each where none is lost."""
    spec = RewardSpec("tests.support.rollout_jobs:fails_on_prompts", "moody")
    batch = {"prompts_per_batch": 3, "updates_per_batch": 3, "needs_old": True, "max_refills": 0, "updates": 8}
    return rollout_job(folder, work, rewards=[spec], **{**batch, **changes})


def test_short_batches_still_make_the_updates_that_were_asked_for(tmp_path: Path) -> None:
    whole, result = run(short_batches(tmp_path, "whole"))
    assert [report.step for report in whole] == list(range(9)) and result.step == 8
    assert sum("checkpoint, finished" in report.event for report in whole) == 1
    trained = [len(line["trained"]) for line in read_log(tmp_path / "whole" / LEDGER) if line["trained"]]
    assert min(trained) < 3 and sum(trained) >= 8, "the test needs a batch that comes out short"
    job = short_batches(tmp_path, "killed")
    killed_after(job, 3)
    pulse.begin()
    again, resumed = run(job)
    assert "resumed" in again[0].event and again[0].step > 0
    for report in again[1:]:
        assert comparable(report) == comparable(whole[report.step])
    one, other = weights(result), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_log(tmp_path / "killed" / LEDGER) == read_log(tmp_path / "whole" / LEDGER)


def test_staleness_counts_batches_where_some_are_short(tmp_path: Path) -> None:
    job = short_batches(tmp_path, "ahead", max_staleness=1, placement="split")
    reports, result = run(job)
    stale = [report.figures["rollout/staleness_max"] for report in reports[1:]]
    assert result.step == 8 and set(stale) == {0.0, 1.0}, "the first batch is fresh, the second was asked for beside it"


def test_rollouts_ahead_are_never_too_old(tmp_path: Path) -> None:
    # What is stale is of another policy, and far from this one here: that is no fault, and ends no run.
    parts: dict[str, Any] = {"rollouts": {"engine_options": {"slots": 8}}, "train": {"optimizer": {"lr": 2e-2}}}
    reports, _ = run(rollout_job(tmp_path, max_staleness=2, updates=8, placement="split", **parts))
    known = [report.figures for report in reports[1:]]
    assert max(figures["mismatch/kl"] for figures in known) > 1e-3, "the bound of the job"
    fresh = [figures["mismatch/kl_fresh"] for figures in known if "mismatch/kl_fresh" in figures]
    assert fresh and max(fresh) < 1e-6, "float32 twice, in another order"
    stale = [report.figures["rollout/staleness_max"] for report in reports[1:]]
    assert max(stale) <= 2 and max(stale) > 0
    assert sorted(trained_visits(read_log(tmp_path / "work" / LEDGER))) == list(range(32))


def test_a_checkpoint_knows_of_what_batches_ahead_have_settled(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_staleness": 1, "placement": "split", "drop_no_signal": True, "max_refills": 20,
                               "save_every": 1, "held_out": HeldOut(4, 0, 1), "updates": 6}  # fmt: skip
    job = rollout_job(tmp_path, **changes)
    killed_after(job, 3)
    pulse.begin()
    run(job)
    lines = read_log(tmp_path / "work" / LEDGER)
    settled = sorted(visit[0] for line in lines for fate in FATES for visit in line[fate])
    assert len(settled) == len(set(settled)) and len(trained_visits(lines)) == 24


def test_groups_without_signal_are_replaced(tmp_path: Path) -> None:
    job = rollout_job(tmp_path, drop_no_signal=True, max_refills=20)
    reports, _ = run(job)
    assert all(report.figures["rollout/no_signal"] == 0 for report in reports[1:])
    lines = read_log(tmp_path / "work" / LEDGER)
    assert all(len(line["trained"]) == 4 for line in lines)
    dropped = [visit for line in lines for visit in line["dropped"]]
    assert dropped and all(reason == "all answers have one reward" for _, _, reason in dropped)


def test_without_any_signal_the_run_stops(tmp_path: Path) -> None:
    spec = RewardSpec("tests.support.rollout_jobs:constant", "constant")
    with pytest.raises(RolloutError, match="no group of a batch can be learned from"):
        run(rollout_job(tmp_path, rewards=[spec], drop_no_signal=True, max_refills=2))


def test_a_failing_grader_costs_its_answers_alone(tmp_path: Path) -> None:
    spec = RewardSpec("tests.support.rollout_jobs:fails_on_some", "moody")
    reports, result = run(rollout_job(tmp_path, rewards=[spec], updates=3))
    assert result.step == 3 and sum(report.figures["reward/failed"] for report in reports[1:]) > 0


def test_a_grader_that_always_fails_stops_the_run_and_is_named(tmp_path: Path) -> None:
    spec = RewardSpec("tests.support.rollout_jobs:raises", "broken")
    with pytest.raises(RolloutError, match="no group of a batch") as told:
        run(rollout_job(tmp_path, rewards=[spec]))
    assert "quarantined" in str(told.value) and "broken: " in str(told.value)


def test_weights_that_did_not_arrive_stop_the_run(tmp_path: Path) -> None:
    job = rollout_job(tmp_path, rollouts={"engine": "tests.support.engines:forgetful_engine"})
    with pytest.raises(RolloutError, match="does not have the trainer's weights"):
        run(job)


@pytest.mark.parametrize("ahead", [{}, {"max_staleness": 2, "placement": "split"}])
def test_a_sampler_that_says_otherwise_stops_the_update(tmp_path: Path, ahead: dict[str, Any]) -> None:
    job = rollout_job(tmp_path, rollouts={"engine": "tests.support.engines:lying_engine"}, **ahead)
    with pytest.raises(TrainingError, match="disagree about the sampled tokens"):
        run(job)


def test_answers_are_kept_to_be_read(tmp_path: Path) -> None:
    run(rollout_job(tmp_path, updates=2))
    lines = (tmp_path / "work" / ANSWERS).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * 3 * 3 and '"kind": "best"' in lines[2]


def test_a_stop_is_heeded_behind_a_checkpoint(tmp_path: Path) -> None:
    from posttrain_lib.errors import PreemptedError

    job = rollout_job(tmp_path)
    assert job.rollouts is not None
    events = train_on_rollouts(job, job.rollouts)
    assert next(events).step == 0
    pulse.ask_to_stop("the machine is wanted back")
    with pytest.raises(PreemptedError, match="stopped after step 1"):
        list(events)
    pulse.begin()
    assert run(job)[0][0].event == "resumed"


def test_incidents_cannot_be_rolled_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be rolled back"):
        run(rollout_job(tmp_path, train={"incidents": {"non_finite": "roll_back"}}))


def test_solved_prompts_are_left_out_of_a_pass(tmp_path: Path) -> None:
    spec = RewardSpec("tests.support.rollout_jobs:Solved", "solved")
    job = rollout_job(tmp_path, rewards=[spec], skip_solved=1.0, updates=9)
    run(job)
    lines = read_log(tmp_path / "work" / LEDGER)
    skipped = [visit for line in lines for visit, _, _ in line["skipped"]]
    trained = trained_visits(lines)
    assert skipped and all(visit >= 24 for visit in skipped), "in the first pass nothing is known of a prompt"
    assert sorted([*skipped, *trained]) == list(range(len(skipped) + len(trained)))


def test_a_policy_learns_from_a_teacher_at_every_token(tmp_path: Path) -> None:
    """The teacher is a policy that learned to be short; no reward says so."""
    taught = rollout_job(tmp_path, "teacher", updates=30, save_every=30, train={"optimizer": {"lr": 2e-2}})
    model = weights(run(taught)[1])
    write_teacher(tmp_path, model)
    spec = RewardSpec("tests.support.rollout_jobs:short", "short", weight=0.0)
    rollouts = {"teacher": str(tmp_path / "teacher-model")}
    job = rollout_job(tmp_path, rewards=[spec], rollouts=rollouts, updates=30, save_every=30, teacher_weight=1.0,
                      train={"optimizer": {"lr": 2e-2}})  # fmt: skip
    pulse.begin()
    reports, _ = run(job)
    short = [report.figures["reward/short"] for report in reports[1:]]
    assert sum(short[-5:]) / 5 > sum(short[:5]) / 5 + 0.2, short


@pytest.mark.slow
def test_vllm_is_an_engine_like_the_embedded_one(tmp_path: Path) -> None:
    """Real vLLM in its own process: weights pushed after every update, compared, and sampled from."""
    pytest.importorskip("vllm")
    rollouts = {"engine": "vllm", "engine_options": {"options": {"block_size": 32}}}
    job = rollout_job(tmp_path, updates=20, save_every=20, train={"optimizer": {"lr": 2e-2}}, rollouts=rollouts)
    reports, _ = run(job)
    short = [report.figures["reward/short"] for report in reports[1:]]
    assert sum(short[-5:]) / 5 > sum(short[:5]) / 5 + 0.2, short
    # vLLM's float32 kernels are others than the trainer's
    assert all(report.figures["mismatch/kl"] < 1e-5 for report in reports[1:])
