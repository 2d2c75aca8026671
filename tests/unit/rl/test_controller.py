"""The controller over roles that fail, are late or lie: the fakes that keep the contracts, with one fault each."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.errors import PosttrainError, PreemptedError, RolloutError, TrainingError
from posttrain_lib.rl.controller import Controller, Roles
from posttrain_lib.rl.ledger import LEDGER, Ledger
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.rewards.pool import GraderPool
from posttrain_lib.rl.roles import RewardRole, Weights
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.rl.sync_guard import SyncGuard
from posttrain_lib.rl.trajectories import Decode, Play
from posttrain_lib.rl.version_log import VersionLog, read_log
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.schema.rollouts import Answer, Completion, Grade, Request, Sampling, TrainSample
from posttrain_lib.training import pulse
from tests.support.ledgers import trained_visits
from tests.support.policy_jobs import policy_job
from tests.support.table_roles import Table, TableEngine, TablePolicy, TableReference

VOCABULARY, WINDOW, UPDATES, PROMPTS, GROUP, TOKENS = 16, 32, 6, 2, 4, 5


class Evens:
    """The share of even ids, which a table learns to say within a few updates."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [Grade(float(np.mean([ord(sign) % 2 == 0 for sign in answer.text]))) for answer in answers]

    def close(self) -> None:
        pass


def letters(ids: Sequence[int]) -> str:
    """A letter for each id, even where the id is."""
    return "".join(chr(64 + each) for each in ids)


@pytest.fixture(autouse=True)
def _fresh_pulse() -> Iterator[None]:
    pulse.begin()
    yield
    pulse.begin()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Table.random(VOCABULARY).write(tmp_path / "model")
    return tmp_path


def policy_in(folder: Path, work: str = "work", kind: type[TablePolicy] = TablePolicy) -> TablePolicy:
    return kind(policy_job(folder, work, steps=UPDATES, optimizer={"lr": 3.0}))


def engine_in(folder: Path, kind: type[TableEngine] = TableEngine, **options: Any) -> TableEngine:
    return kind(Table.read(folder / "model"), window=WINDOW, slots=5, decode=letters, **options)


def settings_of(**changes: Any) -> RLSettings:
    fields: dict[str, Any] = {
        "updates": UPDATES,
        "prompts_per_batch": PROMPTS,
        "group_size": GROUP,
        "sampling": Sampling(TOKENS),
        "save_every": 2,
        "held_out": HeldOut(prompts=2, every_steps=3),
        "needs_old": True,
    }
    return RLSettings(**{**fields, **changes})


def run(
    folder: Path,
    engine: TableEngine,
    policy: TablePolicy,
    settings: RLSettings | None = None,
    *,
    reward: RewardRole | None = None,
    decode: Decode = letters,
    **roles: Any,
) -> list[StepReport]:
    """To the end, or to what is raised."""
    prompts = [RolloutPrompt((1, 2, 3 + number), ({"content": "?"},), None, "s", str(number)) for number in range(8)]
    guard = SyncGuard([(1, 2, 3, 4)], bound=1e-6)
    controller = Controller(
        prompts,
        prompts[:2],
        Roles(policy, engine, reward or Evens(), guard, **roles),
        settings or settings_of(),
        Play(decode),
        Ledger(VersionLog(folder / LEDGER)),
    )
    return list(controller.run())


def weights(policy: TablePolicy) -> list[torch.Tensor]:
    return [value for _, value in policy.weights()]


def same(left: TablePolicy, right: TablePolicy) -> bool:
    return all(torch.equal(one, other) for one, other in zip(weights(left), weights(right), strict=True))


def visits_in(folder: Path) -> list[int]:
    return sorted(trained_visits(read_log(folder / LEDGER)))


EVERY_VISIT = list(range(UPDATES * PROMPTS))


def test_a_table_learns_what_is_rewarded(folder: Path) -> None:
    policy = policy_in(folder)
    reports = run(folder, engine_in(folder), policy, settings_of(updates=30, prompts_per_batch=8))
    rewards = [report.figures["reward/mean"] for report in reports[1:]]
    assert policy.version == 30 and sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15, rewards


def test_the_best_look_is_a_checkpoint_whenever_it_was(folder: Path) -> None:
    """Looks and checkpoints have steps of their own; what is called the best is the best that was seen."""
    policy = policy_in(folder)
    reports = run(folder, engine_in(folder), policy, settings_of(save_every=4, held_out=HeldOut(2, every_steps=1)))
    looks = {report.step: report.held_out["all"] for report in reports[1:] if report.held_out is not None}
    lowest = min(looks, key=lambda step: (looks[step], step))
    assert len(looks) == UPDATES and lowest % 4 and lowest != UPDATES, "else any rule would find it"
    result = policy.result()
    assert result.best_checkpoint is not None and int(Path(result.best_checkpoint).name) == lowest
    assert result.best_held_out == looks[lowest] and "best, checkpoint" in reports[lowest].event


class Moody(Evens):
    """Has no word for answers that begin with an A."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        fails = [answer.text.startswith("A") for answer in answers]
        return [
            Grade(None, failure="moody: an A") if bad else one
            for bad, one in zip(fails, super().grade(answers), strict=True)
        ]


def test_why_answers_have_no_grade_is_told_once_by_the_report_of_their_step(folder: Path) -> None:
    """In groups that are learned from, too, of which no other file says why."""
    settings = settings_of(held_out=HeldOut(prompts=0), group_size=8, updates=20)
    reports = run(folder, engine_in(folder), policy_in(folder), settings, reward=Moody())
    told = [int(found[1]) for each in reports if (found := re.search(r"(\d+) x moody: an A", each.event))]
    failed = [figures["reward/failed"] for each in reports if (figures := each.figures)]
    assert told and told == [count for count in failed if count]
    assert not any("gradings failed" in each.event for each in reports if not each.figures.get("reward/failed"))


class Mortal(TableEngine):
    """Dies in the call of that number, of whatever kind, and stays dead."""

    def __init__(self, *args: Any, lives: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lives = lives

    def _check_there(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise RolloutError("the rollout engine's process does not answer any more", where="process 7")
        super()._check_there()


def died(folder: Path, lives: int, **changes: Any) -> bool:
    """Whether it did before the run's end."""
    with contextlib.suppress(RolloutError):
        run(folder, engine_in(folder, Mortal, lives=lives), policy_in(folder), settings_of(**changes))
        return False
    return True


def test_an_engine_that_dies_ends_the_run_by_name(folder: Path) -> None:
    with pytest.raises(RolloutError, match=r"does not answer any more\n.*process 7"):
        run(folder, engine_in(folder, Mortal, lives=50), policy_in(folder))


@pytest.mark.parametrize("changes", [{}, {"max_staleness": 2, "placement": "split"}], ids=["in turns", "ahead"])
def test_wherever_it_dies_the_next_run_trains_each_visit_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    """And in turns, to the bits of a run in which nothing died."""
    model = Table.random(VOCABULARY)
    model.write(tmp_path / "whole" / "model")
    whole = policy_in(tmp_path / "whole")
    run(tmp_path / "whole", engine_in(tmp_path / "whole"), whole, settings_of(**changes))
    for lives in range(0, 1000, 7):
        folder = tmp_path / str(lives)
        model.write(folder / "model")
        if not died(folder, lives, **changes):
            break
        policy = policy_in(folder)
        reports = run(folder, engine_in(folder), policy, settings_of(**changes))
        assert [report.step for report in reports][-1] == UPDATES
        assert visits_in(folder) == EVERY_VISIT
        assert changes or same(policy, whole)
    assert 60 < lives < 990, "it died in every part of a run, and in the end did not"


class Late(TableEngine):
    """Gives nothing in two steps of three."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps = 0

    def step(self) -> list[Completion]:
        self.steps += 1
        return [] if self.steps % 3 else super().step()


def test_a_late_engine_changes_no_bit(folder: Path) -> None:
    prompt, late = policy_in(folder, "prompt"), policy_in(folder, "late")
    run(folder, engine_in(folder), prompt)
    run(folder, engine_in(folder, Late), late)
    assert same(prompt, late)


def test_behind_a_late_engine_nothing_is_too_old(folder: Path) -> None:
    reports = run(folder, engine_in(folder, Late), policy_in(folder), settings_of(max_staleness=1, placement="split"))
    stale = [report.figures["rollout/staleness_max"] for report in reports[1:]]
    assert max(stale) == 1 and visits_in(folder) == EVERY_VISIT


class Talkative(TableEngine):
    """Gives a completion that nobody asked for."""

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit([*requests, *(Request("own", (1,), Sampling(1), 0) for _ in range(self.unfinished == 0))])


class Forgetful(TableEngine):
    """Leaves a request, and says no word of it."""

    def step(self) -> list[Completion]:
        self._running.pop(next(reversed(self._running)), None)
        return super().step()


class Stubborn(TableEngine):
    """Reads new weights and keeps those of its first push."""

    def push(self, weights: Weights, version: int) -> str:
        kept = list(self.model.weights())
        received = super().push(weights, version)
        if version:
            self.model = Table.holding(kept)
        return received


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Talkative, "that nobody asked for"),
        (Forgetful, "has lost requests"),
        (Stubborn, "does not have the trainer's weights"),
    ],
)
def test_an_engine_that_lies_ends_the_run(kind: type[TableEngine], said: str, folder: Path) -> None:
    with pytest.raises(RolloutError, match=said):
        run(folder, engine_in(folder, kind), policy_in(folder))


class Refusing(TablePolicy):
    """Takes five updates."""

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        if self.version == 5:
            raise TrainingError("the loss is not finite")
        return super().update(samples)


class Unreadable(TableReference):
    """Cannot score."""

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        raise TrainingError("a rank died")


def test_what_a_policy_raises_ends_the_run_and_the_next_goes_on(folder: Path) -> None:
    whole = policy_in(folder, "whole")
    run(folder, engine_in(folder), whole)
    with pytest.raises(TrainingError, match="not finite"):
        run(folder, engine_in(folder), policy_in(folder, kind=Refusing))
    policy = policy_in(folder)
    reports = run(folder, engine_in(folder), policy)
    assert (reports[0].step, reports[0].event) == (4, "resumed") and visits_in(folder) == EVERY_VISIT
    assert same(policy, whole)


class Stopped(TableEngine):
    """At its call of that number a stop is asked for, as by a signal."""

    calls = 0
    at: int

    def _check_there(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            pulse.ask_to_stop("the machine is wanted back")
        super()._check_there()


def test_whenever_a_stop_is_asked_for_its_checkpoint_is_written(folder: Path) -> None:
    """In the middle of a look at the policy, too."""
    settings = settings_of(save_every=100, held_out=HeldOut(2, every_steps=1))
    stopped = 0
    for at in range(1, 1000, 5):
        pulse.begin()
        policy, engine = policy_in(folder, f"work-{at}"), engine_in(folder, Stopped)
        engine.at = at
        try:
            run(folder, engine, policy, settings)
        except PreemptedError:
            stopped += 1
        again = policy_in(folder, f"work-{at}")
        assert again.resume() is not None and again.version == policy.version, f"a stop at call {at}"
        if engine.calls < at:
            break
    assert stopped > 20 and policy.version == UPDATES


@pytest.mark.parametrize("role", ["reference", "teacher"])
def test_what_a_frozen_model_raises_ends_the_run(role: str, folder: Path) -> None:
    frozen = Unreadable(Table.read(folder / "model"), 32)
    with pytest.raises(PosttrainError, match="a rank died"):
        run(folder, engine_in(folder), policy_in(folder), **{role: frozen})


def sleeps(answer: Answer) -> float:
    """Never says anything."""
    threading.Event().wait()
    return 0.0


class Noting(TablePolicy):
    """Keeps the visits that it was given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: set[int] = set()

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        self.given |= {sample.group for sample in samples}
        return super().update(samples)


def test_the_ledger_calls_trained_what_the_policy_was_given(folder: Path) -> None:
    """Not a group of which every answer was cut off, where such are not learned from."""
    policy = policy_in(folder, kind=Noting)
    sampling = Sampling(TOKENS, stop_ids=frozenset({1, 2}))
    run(folder, engine_in(folder), policy, settings_of(sampling=sampling, mask_unfinished=True, prompts_per_batch=4))
    assert visits_in(folder) == sorted(policy.given)
    dropped = [visit for line in read_log(folder / LEDGER) for visit in line["dropped"]]
    assert dropped and all(reason == "all answers were cut off" for _, _, reason in dropped)


class Asked(GraderPool):
    """Tells that it was."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = threading.Event()

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        self.asked.set()
        return super().grade(answers)


class Dying(TableEngine):
    """Dies with its last request, once the graders are at work."""

    pool: Asked

    def step(self) -> list[Completion]:
        if self.unfinished == 1:
            self.pool.asked.wait()
            raise RolloutError("the rollout engine's process does not answer any more", where="process 7")
        return super().step()


def test_a_grader_that_hangs_does_not_hold_up_the_end(folder: Path) -> None:
    """It has an hour for each answer."""
    engine = engine_in(folder, Dying)
    engine.pool = Asked([RewardSpec(f"{__name__}:sleeps", "sleeps", deadline_seconds=3600.0)], workers=1)
    engine.pool.check()
    before = set(threading.enumerate())
    settings = settings_of(held_out=HeldOut(0), max_staleness=1, placement="split")
    with pytest.raises(RolloutError, match="does not answer any more"):
        run(folder, engine, policy_in(folder), settings, reward=engine.pool)
    assert set(threading.enumerate()) <= before


def test_where_one_answer_fails_the_others_end_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loops, new = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(new()) or loops[-1])

    left = iter(range(3))

    def refuses(ids: Sequence[int]) -> str:
        if next(left, None) is None:
            raise ValueError("no such letters")
        return letters(ids)

    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="no such letters"):
        run(folder, engine_in(folder), policy_in(folder), settings_of(held_out=HeldOut(0)), decode=refuses)
    assert len(loops) == 1 and not asyncio.all_tasks(loops[0])
    assert set(threading.enumerate()) <= before
