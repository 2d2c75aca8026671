"""The reward role: every grading in a process that may be killed, results in order, failures counted by reason."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict
from posttrain_lib.rl.rewards.process import Failure, GradingProcess
from posttrain_lib.schema.rollouts import Answer, Grade
from posttrain_lib.training import pulse

Outcome = Verdict | Failure


class GraderPool:
    """A ``RewardRole``. Processes are started when first needed, and again when they were ended.

    A grader is made once in each of its processes and may keep what it needs between answers, processes too; those that
    it starts while it grades are ended behind the answer, and its process with them. What it prints goes nowhere.

    Args:
        specs: the terms of the reward, at least one.
        workers: most processes of each grader; one that takes several answers at once (``grade_many``) has one.
        batch: most answers of one such call. Where it fails, the answers are asked one by one.
        start_seconds: what making a grader may take.

    Attributes:
        counts: ``"<title>: <reason>"`` -> answers that it failed on, or left processes running behind.

    Raises:
        ConfigError: specs that cannot be together, or values out of range.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], *, workers: int = 2, batch: int = 16, start_seconds: float = 600.0
    ) -> None:
        _check(specs)
        if workers < 1 or batch < 1 or not start_seconds > 0:
            raise ConfigError(
                "grading needs processes, and time to start them",
                where="rewards",
                got=f"workers {workers}, batch {batch}, start_seconds {start_seconds}",
                expected="1 or more, and some time",
            )
        self._specs = tuple(specs)
        self.counts: Counter[str] = Counter()
        self._counting, self._starting = threading.Lock(), threading.Lock()
        self._lanes = [_Lane(spec, workers, batch, start_seconds, self._count) for spec in specs]
        self._checked = False

    def check(self) -> None:
        """Make every grader once, before there is anything to grade.

        Raises:
            ConfigError: one cannot be made. The pool is then closed.
        """
        with self._starting:
            if self._checked:
                return
            try:
                for lane in self._lanes:
                    lane.begin()
                for lane in self._lanes:
                    lane.check()
            except BaseException:
                self.close()
                raise
            self._checked = True

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """As ``RewardRole.grade``. Several threads may ask.

        Raises:
            ConfigError: before the first answer, as :meth:`check`.
        """
        self.check()
        waiting = [lane.submit(answers) for lane in self._lanes]
        columns = [[outcome for future in futures for outcome in future.result()] for futures in waiting]
        return [grade_of(self._specs, [column[place] for column in columns]) for place in range(len(answers))]

    def close(self) -> None:
        """End every process, and what is being graded with it. Further calls are errors."""
        for lane in self._lanes:
            lane.close()

    def _count(self, title: str, reason: str) -> None:
        with self._counting:
            self.counts[f"{title}: {reason}"] += 1


def grade_of(specs: Sequence[RewardSpec], outcomes: Sequence[Outcome]) -> Grade:
    """The weighted sum of what the graders said of an answer.

    It is right where all that judge that say so. A failure of a grader that weighs something fails the answer.
    """
    parts: dict[str, float] = {}
    said: list[bool] = []
    failure = None
    for spec, outcome in zip(specs, outcomes, strict=True):
        if isinstance(outcome, Failure):
            failure = failure or (f"{spec.title}: {outcome}" if spec.weight != 0 else None)
            continue
        parts[spec.title] = outcome.value
        if outcome.correct is not None:
            said.append(outcome.correct)
    if failure is not None:
        return Grade(None, parts, None, failure)
    reward = sum(spec.weight * parts[spec.title] for spec in specs if spec.weight != 0)
    if not math.isfinite(reward):
        return Grade(None, parts, None, "the weighted sum is not finite")
    return Grade(float(reward), parts, all(said) if said else None)


class _Lane:
    """The processes of one grader, and the threads that wait for them."""

    def __init__(
        self, spec: RewardSpec, workers: int, batch: int, start_seconds: float, count: Callable[[str, str], None]
    ) -> None:
        self._spec, self._start_seconds, self._count = spec, start_seconds, count
        self._workers, self._batch = workers, batch
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._idle: list[GradingProcess] = []
        self._all: set[GradingProcess] = set()
        self._closed = False

    def begin(self) -> None:
        """Start the first process; does not wait for it."""
        self._put(self._take())

    def check(self) -> None:
        """Wait until the first grader is made; ConfigError where it cannot be."""
        process = self._take()
        batched = process.ready()
        self._put(process)
        self._batch = self._batch if batched else 1
        self._threads = ThreadPoolExecutor(1 if batched else self._workers, f"grading {self._spec.title}")

    def submit(self, answers: Sequence[Answer]) -> list[Future[list[Outcome]]]:
        """Outcomes to come, in order."""
        assert self._threads is not None, "checked before"
        chunks = [answers[first : first + self._batch] for first in range(0, len(answers), self._batch)]
        return [self._threads.submit(self._counted, chunk) for chunk in chunks]

    def close(self) -> None:
        """End the processes first, so that no thread waits longer for an answer."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True)

    def _counted(self, answers: Sequence[Answer]) -> list[Outcome]:
        outcomes = self._grade(answers)
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                self._count(self._spec.title, outcome.kind)
        return outcomes

    def _grade(self, answers: Sequence[Answer]) -> list[Outcome]:
        process = self._take()
        outcomes, left = process.grade(answers)
        self._put(process)
        pulse.beat("grading")  # many that hang until their deadline may take longer than a rank may be silent
        if left:
            self._count(self._spec.title, "left processes running")
        if not isinstance(outcomes, Failure):
            return list(outcomes)
        if len(answers) == 1:
            return [outcomes]
        return [outcome for answer in answers for outcome in self._grade([answer])]

    def _take(self) -> GradingProcess:
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of graders is closed")
            if self._idle:
                return self._idle.pop()
            process = GradingProcess(self._spec, self._start_seconds)
            self._all.add(process)
            return process

    def _put(self, process: GradingProcess) -> None:
        if not process.is_open:
            process.close()
        with self._lock:
            if process.is_open:
                self._idle.append(process)
            else:
                self._all.discard(process)


def _check(specs: Sequence[RewardSpec]) -> None:
    titles = [spec.title for spec in specs]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if not specs or twice:
        raise ConfigError(
            "rewards need titles of their own" if twice else "there is no reward",
            where="rewards",
            got=", ".join(twice) or "none",
            expected="at least one, each with another title",
        )
    for spec in specs:
        limits = [spec.deadline_seconds] if spec.memory_gib is None else [spec.deadline_seconds, spec.memory_gib]
        if not math.isfinite(spec.weight) or not all(math.isfinite(limit) and limit > 0 for limit in limits):
            raise ConfigError(
                "a reward needs a finite weight, and limits above 0",
                where=f"rewards: {spec.title}",
                got=f"weight {spec.weight}, deadline_seconds {spec.deadline_seconds}, memory_gib {spec.memory_gib}",
            )
