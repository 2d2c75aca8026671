"""The driver of reinforcement learning: a control plane over policy, rollout, reward and reference.

    ledger --visits--> _group --requests--> EnginePump --completions--> _group --answers--> GradingDesk
                          |                     ^                          |
                          v                     | push, version            v
                       _collect --batch--> _learn --samples--> policy.update --every so often--> checkpoint, held-out

    loop      consumes                    produces                waits for            unblocked by
    pump      requests                    completions             requests             a group, a held-out look
    desk      answers                     grades                  answers              a group whose answers are there
    collect   visits, groups              one batch               its groups           pump and desk
    train     the next batch              updates, weights        that batch           collect

``max_staleness`` batches are collected ahead of the one that is learned; with 0 every loop stands still while another
works, and a run's bits depend on no clock. A batch is asked for only when all batches but ``max_staleness`` before it
are learned and pushed, so that no sample can be older, whatever the engine does.

The controller knows roles alone. Everything that it knows itself is in :meth:`Controller.state`, and goes into the
policy's checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from posttrain_lib.errors import RolloutError
from posttrain_lib.losses.policy import OLD, REFERENCE
from posttrain_lib.rl.advantages import advantages_of
from posttrain_lib.rl.curriculum import Curriculum
from posttrain_lib.rl.desk import GradingDesk
from posttrain_lib.rl.figures import (
    Times,
    batch_figures,
    held_out_figures,
    held_out_scores,
    measure_of,
    shown_answers,
)
from posttrain_lib.rl.ledger import Settled
from posttrain_lib.rl.prompts import PromptOrder
from posttrain_lib.rl.pump import EnginePump
from posttrain_lib.rl.rewards.shaping import normalised
from posttrain_lib.rl.trajectories import Group, samples_of, seed_for, to_grade, with_failures, with_teacher
from posttrain_lib.schema.reports import first_report
from posttrain_lib.schema.rollouts import TrainSample
from posttrain_lib.training import pulse
from posttrain_lib.training.preemption import preempted

if TYPE_CHECKING:
    from posttrain_lib.rl.ledger import Ledger
    from posttrain_lib.rl.prompts import RolloutPrompt
    from posttrain_lib.rl.roles import PolicyRole, ReferenceRole, RewardRole, RolloutRole
    from posttrain_lib.rl.settings import RLSettings
    from posttrain_lib.rl.sync_guard import SyncGuard
    from posttrain_lib.rl.trajectories import Player, Trajectory
    from posttrain_lib.rl.version_log import VersionLog
    from posttrain_lib.schema.reports import StepReport
    from posttrain_lib.schema.rollouts import Grade

T = TypeVar("T")

#: characters of a reason in a message
_SHOWN_REASON = 200


@dataclasses.dataclass(frozen=True)
class Roles:
    """Who plays what. ``guard`` compares the engine's weights with the policy's after every push."""

    policy: PolicyRole
    rollout: RolloutRole
    reward: RewardRole
    guard: SyncGuard
    reference: ReferenceRole | None = None
    teacher: ReferenceRole | None = None


class Controller:
    """One run's loops.

    Args:
        prompts, held_out: what is asked in training, and to look at the policy.
        play: how a prompt is answered. ledger: what became of every prompt.
        answers: where those of each batch go that are kept to be read.

    ``batch`` counts the batches that were learned; ``_learned`` has that number of each version that was pushed. A
    batch with fewer groups than ``updates_per_batch`` makes fewer updates, so versions do not tell it; and a run
    collects until its updates are made.
    """

    def __init__(
        self,
        prompts: Sequence[RolloutPrompt],
        held_out: Sequence[RolloutPrompt],
        roles: Roles,
        settings: RLSettings,
        play: Player,
        ledger: Ledger,
        answers: VersionLog | None = None,
    ) -> None:
        self.prompts, self.held_out = prompts, held_out[: settings.held_out.prompts]
        self.roles, self.settings, self.play, self.ledger, self.answers = roles, settings, play, ledger, answers
        self.order = PromptOrder(len(prompts), settings.seed)
        self.curriculum = Curriculum(settings.skip_solved, settings.skip_hopeless)
        self.pump = EnginePump(roles.rollout, in_waves=settings.max_staleness == 0)
        self.desk = GradingDesk(roles.reward)
        self.times = Times()
        self.batch = 0
        #: what looks at held-out prompts are compared by, a key of ``rl.figures.MEASURES``; its value before the first
        #: update, and the lowest behind one
        self.measure: str | None = None
        self.first_held_out: float | None = None
        self.best_held_out: float | None = None
        #: why answers have no grade, graders' failures and environments': of the run so far, and since the last report
        self.failures: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self._learned: dict[int, int] = {}
        self._stopping = False
        self._policy_thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the controller; JSON-ready."""
        looks = {"measure": self.measure, "first_held_out": self.first_held_out, "best_held_out": self.best_held_out}
        known = {"batch": self.batch, **looks}
        return {**known, "ledger": self.ledger.state(), "rates": self.curriculum.state()}

    def run(self) -> Generator[StepReport, None, None]:
        """A report for each update, the first one of the policy as it is found.

        Raises:
            PreemptedError: a stop was asked for; a checkpoint is written.
            PosttrainError: what a role raises.
        """
        loop = asyncio.new_event_loop()
        reports: asyncio.Queue[StepReport | None] = asyncio.Queue()
        main = loop.create_task(self._main(reports))
        main.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (report := loop.run_until_complete(reports.get())) is not None:
                yield report
            _raise_first(main)
        finally:
            with contextlib.ExitStack() as closing:  # one behind the other, whatever any of them meets
                closing.callback(loop.close)
                closing.callback(self._policy_thread.shutdown, wait=True, cancel_futures=True)
                closing.callback(self.pump.close)
                closing.callback(self.desk.close)
                _cancel_all(loop)

    async def _main(self, reports: asyncio.Queue[StepReport | None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(self.pump.run()), tasks.create_task(self.desk.run())]
            await self._train(reports, tasks)
            for task in working:
                task.cancel()

    async def _train(self, reports: asyncio.Queue[StepReport | None], tasks: asyncio.TaskGroup) -> None:
        """Consumes: batches. Produces: updates, weights, reports. Waits for: the next batch."""
        policy, settings = self.roles.policy, self.settings
        known = await self._on_policy(policy.resume)
        if known is not None:
            state, report = known
            self.batch, self.measure = int(state["batch"]), state["measure"]
            self.first_held_out, self.best_held_out = state["first_held_out"], state["best_held_out"]
            told = self.ledger.load_state(state["ledger"], policy.version)
            self.curriculum.load_state(state["rates"])
            if self.answers is not None:
                self.answers.start(policy.version)
            await self._push()
            reports.put_nowait(dataclasses.replace(report, event=f"resumed, {told}" if told else "resumed"))
        else:
            self.ledger.begin()
            if self.answers is not None:
                self.answers.start(0)
            await self._push()
            looked = await self._look()
            self.first_held_out = looked.get("held_out", {}).get("all")
            reports.put_nowait(dataclasses.replace(first_report(settings.updates), **looked))
        ahead: dict[int, asyncio.Task[list[Group]]] = {}
        while left := settings.batches_left(policy.version):
            self.times.begin(self.pump.busy.seconds, self.desk.busy.seconds)
            for number in range(self.batch, self.batch + min(1 + settings.max_staleness, left)):
                if number not in ahead:
                    ahead[number] = tasks.create_task(self._collect(number))
            with self.times.part("wait_for_rollouts"):
                groups = await ahead.pop(self.batch)
            async for report in self._learn(groups):
                reports.put_nowait(report)
            if self._stopping and policy.version < settings.updates:
                raise preempted(policy.version)

    async def _collect(self, number: int) -> list[Group]:
        """The groups of a batch, in the order of their visits.

        Consumes: visits. Produces: graded groups. Waits for: engine and graders.

        Raises:
            RolloutError: no group at all can be learned from.
        """
        settings = self.settings
        kept: list[Group] = []
        for _ in range(1 + settings.max_refills):
            visits = self.ledger.issue(settings.prompts_per_batch - len(kept), self._skipped)
            groups = await asyncio.gather(*(self._group(visit) for visit in visits))
            for group in groups:
                self.curriculum.note(self.order.prompt_of(group.visit), group.grades)
                if (why := self._unfit(group)) is None:
                    kept.append(group)
                else:
                    self.ledger.settle([Settled(group.visit, group.prompt.name, *why)])
            if len(kept) == settings.prompts_per_batch:
                break
        if not kept:
            raise RolloutError(
                "no group of a batch can be learned from",
                where=f"batch {number}",
                got=f"so far {self._told()}",
                expected="graders that answer, and answers that differ in reward",
                fix="mend the grader that is named; or, where no answer is better than another: easier or harder "
                "prompts, a warm start, more answers a prompt, or grpo.drop_no_signal: false",
            )
        return kept

    def _skipped(self, visit: int) -> Settled | None:
        """Of a fresh visit: that its prompt is left out this time."""
        number = self.order.prompt_of(visit)
        why = self.curriculum.skips(number, len(self.prompts))
        return None if why is None else Settled(visit, self.prompts[number].name, "skipped", why)

    def _told(self) -> str:
        """What became of visits so far, and what graders failed on most."""
        fates = ", ".join(f"{count} {fate}" for fate, count in self.ledger.counts.items())
        return f"{fates}{'; gradings that failed: ' + _most(self.failures) if self.failures else ''}"

    def _unfit(self, group: Group) -> tuple[Any, str] | None:
        """(fate, reason) of a group that is not learned from; None: it is."""
        if not group.graded:
            failures = sorted({grade.failure or "nothing was sampled" for grade in group.grades})
            return "quarantined", "; ".join(failures)[:500]
        if self.settings.drop_no_signal and not group.has_signal:
            return "dropped", "all answers have one reward"
        return None

    async def _group(self, visit: int) -> Group:
        prompt, settings = self.prompts[self.order.prompt_of(visit)], self.settings
        playing = (
            self.pump.asking(
                partial(
                    self.play,
                    prompt,
                    settings.sampling,
                    seed_for(settings.seed, prompt.name, visit, number),
                    f"{visit}/{number}",
                )
            )
            for number in range(settings.group_size)
        )
        trajectories = await asyncio.gather(*playing)
        grades = await self._graded(trajectories)
        return Group(visit, prompt, trajectories, grades)

    async def _graded(self, trajectories: Sequence[Trajectory]) -> list[Grade]:
        """A grade for each; why some have none is counted."""
        grades = with_failures(trajectories, await self.desk.grade(to_grade(trajectories)))
        for counted in (self.failures, self._untold):
            counted.update(grade.failure for grade in grades if grade.failure)
        return grades

    async def _learn(self, groups: list[Group]) -> Any:
        """The updates of one batch, and what is due behind the last one."""
        settings, policy = self.settings, self.roles.policy
        advantages = self._advantages(groups)
        samples = samples_of(groups, advantages, policy.version, mask_unfinished=settings.mask_unfinished)
        if not samples:
            raise RolloutError(
                "every answer of the batch was cut off, and such are not learned from",
                where=f"batch {self.batch}",
                got=f"{settings.sampling.max_new_tokens} tokens at most",
                fix="allow longer answers (grpo.rollout.max_new_tokens), or leave grpo.mask_unfinished off",
            )
        figures = batch_figures(groups, advantages, self.batch, self._learned)
        if settings.placement == "colocated":
            with self.times.part("sleep"):
                await self.pump.exclusive(self.roles.rollout.sleep)
        samples = await self._with_signals(samples)
        since = policy.version
        parts = _parts(samples, min(settings.updates_per_batch, settings.updates - since))
        for number, part in enumerate(parts):
            with self.times.part("update"):
                report = await self._on_policy(partial(policy.update, part))
            if number + 1 < len(parts):
                yield dataclasses.replace(report, figures=report.figures | figures)
        learned = {sample.group for sample in samples}
        self.ledger.settle(
            Settled(group.visit, group.prompt.name, "trained")
            if group.visit in learned
            else Settled(group.visit, group.prompt.name, "dropped", "all answers were cut off")
            for group in groups
        )
        self.ledger.close_update(policy.version)
        self.batch += 1
        if settings.placement == "colocated":
            with self.times.part("wake"):
                await self.pump.exclusive(self.roles.rollout.wake)
        await self._push()
        shown = shown_answers(groups, policy.version, settings.shown)
        if self.answers is not None:
            self.answers.append(shown)
        yield await self._after_batch(dataclasses.replace(report, answers=tuple(shown)), figures, since)

    async def _after_batch(self, report: StepReport, figures: dict[str, float], since: int) -> StepReport:
        """Look and save where it is due, save a new best, too, and tell. ``since``: the batch's first version."""
        settings, policy = self.settings, self.roles.policy
        over = policy.version >= settings.updates
        looked, events = {}, [report.event] if report.event else []
        if over or _passed(settings.held_out.every_steps, since, policy.version):
            with self.times.part("held_out"):
                looked = await self._look()
        else:  # a long run's reports stay small: every answer that is shown stands in a file of its own
            report = dataclasses.replace(report, answers=())
        best = self._is_best(looked)
        # Asked once, for a stop may come at any moment: who says that a checkpoint is written goes by the same answer.
        self._stopping = pulse.stop_reason() is not None
        saves = over or best or self._stopping or _passed(settings.save_every, since, policy.version)
        events += ["best"] if best else []
        events += ["checkpoint"] if saves else []
        events += ["finished"] if over else []
        events += [f"{self._untold.total()} gradings failed: {_most(self._untold)}"] if self._untold else []
        self._untold.clear()
        times = self.times.figures(self.pump.busy.seconds, self.desk.busy.seconds)
        counts = {f"rollout/{fate}": float(count) for fate, count in self.ledger.counts.items()}
        report = dataclasses.replace(
            report, figures={**report.figures, **figures, **counts, **times}, event=", ".join(events), **looked
        )
        if saves:
            # Batches ahead may have settled visits since; and they go on while the checkpoint is written.
            self.ledger.close_update(policy.version)
            state = self.state()
            await self._on_policy(lambda: policy.save(state, report, wait=over or self._stopping))
        return report

    def _is_best(self, looked: dict[str, Any]) -> bool:
        """Whether a look found the policy better than every one behind an earlier update."""
        value = looked.get("held_out", {}).get("all")
        if value is None or (self.best_held_out is not None and value >= self.best_held_out):
            return False
        self.best_held_out = value
        return True

    def _advantages(self, groups: list[Group]) -> list[np.ndarray]:
        settings = self.settings
        rewards = np.concatenate([group.rewards for group in groups])
        numbers = np.repeat(np.arange(len(groups)), [len(group.graded) for group in groups])
        tokens = np.array([len(group.trajectories[one].logprobs) for group in groups for one in group.graded])
        rewards = normalised(settings.normalise, rewards, numbers, clip=settings.clip_reward)
        worth = advantages_of(settings.advantage, rewards, numbers, tokens)
        return np.split(worth, np.cumsum([len(group.graded) for group in groups])[:-1])

    async def _with_signals(self, samples: list[TrainSample]) -> list[TrainSample]:
        """What the loss compares with besides: the policy before the batch's updates, a frozen model."""
        policy, reference = self.roles.policy, self.roles.reference
        if self.settings.needs_old:
            with self.times.part("old_logprobs"):
                old = await self._on_policy(lambda: policy.logprobs(samples))
            samples = _with_signal(samples, OLD, old)
        if reference is not None:
            with self.times.part("reference_logprobs"):
                known = await self._on_policy(lambda: reference.logprobs(samples))
            samples = _with_signal(samples, REFERENCE, known)
        if self.roles.teacher is not None:
            teacher = self.roles.teacher
            with self.times.part("teacher_logprobs"):
                known = await self._on_policy(lambda: teacher.logprobs(samples))
            samples = with_teacher(samples, known, self.settings.teacher_weight)
        return samples

    async def _push(self) -> None:
        """The policy's weights into the engine, and the proof that they are there.

        In the policy's thread, as all that asks the policy, while the engine's own stands still. That one is free: only
        ``_train`` asks the policy, and it waits here.
        """
        guard, policy, rollout = self.roles.guard, self.roles.policy, self.roles.rollout

        def score(canaries: Sequence[Sequence[int]]) -> list[np.ndarray]:
            samples = [_canary(ids, number) for number, ids in enumerate(canaries)]
            return policy.logprobs(samples, temperature=1.0)

        def push() -> None:
            guard.push(rollout, policy.weights(), policy.version, score)

        self._learned[policy.version] = self.batch
        with self.times.part("push"):
            await self.pump.exclusive(lambda: self._policy_thread.submit(push).result())

    async def _look(self) -> dict[str, Any]:
        """Fields of a report: how the policy does on held-out prompts."""
        settings = self.settings
        if not self.held_out:
            return {}
        greedy = dataclasses.replace(settings.sampling, temperature=0.0)
        version = self.roles.policy.version
        ways = [greedy, *[settings.sampling] * settings.held_out.samples]
        playing = [
            self.pump.asking(
                partial(
                    self.play,
                    prompt,
                    way,
                    seed_for(settings.seed, prompt.name, -1, number),
                    f"held-out/{version}/{place}/{number}",
                )
            )
            for place, prompt in enumerate(self.held_out)
            for number, way in enumerate(ways)
        ]
        trajectories = await asyncio.gather(*playing)
        grades = await self._graded(trajectories)
        scores = held_out_scores(grades, len(ways))
        self.measure = self.measure or measure_of(scores)
        return held_out_figures(scores, self.measure, grades, trajectories, len(ways))

    async def _on_policy(self, work: Callable[[], T]) -> T:
        """Run in the policy's own thread, so that the loops go on."""
        return await asyncio.get_running_loop().run_in_executor(self._policy_thread, work)


def _most(failures: Counter[str]) -> str:
    """The most frequent reasons, with their numbers, on one line."""
    shown = ((" ".join(reason.split())[:_SHOWN_REASON], count) for reason, count in failures.most_common(3))
    return "; ".join(f"{count} x {reason}" for reason, count in shown)


def _passed(every: int, since: int, version: int) -> bool:
    """Whether a multiple of ``every`` lies within the updates behind ``since``, up to ``version``."""
    return version // every > since // every


def _parts(samples: list[TrainSample], count: int) -> list[list[TrainSample]]:
    """The samples in so many parts of about equal size, groups whole; fewer where there are fewer groups."""
    groups = list(dict.fromkeys(sample.group for sample in samples))
    chosen = [set(part.tolist()) for part in np.array_split(groups, min(count, len(groups)))]
    return [[sample for sample in samples if sample.group in part] for part in chosen]


def _canary(token_ids: Sequence[int], number: int) -> TrainSample:
    """All but the first of its tokens, to be scored."""
    return TrainSample(np.asarray(token_ids, np.int32), np.arange(len(token_ids)) > 0, 1, number, 0)


def _with_signal(samples: list[TrainSample], name: str, values: Sequence[np.ndarray]) -> list[TrainSample]:
    return [
        dataclasses.replace(sample, signals={**sample.signals, name: known})
        for sample, known in zip(samples, values, strict=True)
    ]


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    """End what is left in a loop: where one answer failed, the others of its group are nobody's."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))


def _raise_first(task: asyncio.Task[None]) -> None:
    """Raise what ended the loops: the first of a group of errors, which the others follow from."""
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
