"""What a batch of rollouts says of itself, by name: rewards and their parts, lengths, staleness, time by phase."""

from __future__ import annotations

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.pass_rate import pass_at_k
from posttrain_lib.rl.trajectories import Group, Trajectory
from posttrain_lib.schema.rollouts import Grade

#: how looks at held-out prompts may be compared -> what of it the value is, the lower the better
MEASURES = {"pass@1": "share of wrong held-out answers", "reward": "held-out reward with its sign changed"}


def batch_figures(
    groups: Sequence[Group], advantages: Sequence[np.ndarray], batch: int, learned: Mapping[int, int]
) -> dict[str, float]:
    """Figures of the batch's groups.

    ``reward/...`` means over graded answers; ``rollout/entropy`` estimates the policy's by the sampled tokens' own
    log-probabilities; ``rollout/staleness`` counts the batches that were learned between a token's weights and its use.

    Args:
        batch: batches that were learned before this one. learned: the same of each version that was pushed.
    """
    grades = [grade for group in groups for grade in group.grades]
    trajectories = [one for group in groups for one in group.trajectories]
    rewards = np.concatenate([group.rewards for group in groups])
    tokens = np.array([len(one.logprobs) for one in trajectories], np.float64)
    logprobs = np.concatenate([one.logprobs for one in trajectories])
    versions = np.concatenate([one.versions for one in trajectories])
    staleness = np.array([batch - learned[version] for version in versions.tolist()], np.float64)
    figures = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/group_std": float(np.mean([group.rewards.std() for group in groups])),
        "reward/failed": failed_gradings(grades),
        "advantage/size": float(np.abs(np.concatenate(list(advantages))).mean()),
        "rollout/tokens": float(tokens.mean()),
        "rollout/tokens_max": float(tokens.max()),
        "rollout/unfinished": float(np.mean([not one.finished for one in trajectories])),
        "rollout/no_signal": float(np.mean([not group.has_signal for group in groups])),
        "rollout/entropy": float(-logprobs.mean()) if len(logprobs) else 0.0,
        "rollout/staleness": float(staleness.mean()) if len(staleness) else 0.0,
        "rollout/staleness_max": float(staleness.max(initial=0)),
    }
    if (right := _share_correct(grades)) is not None:
        figures["rollout/correct"] = right
    return figures | {f"reward/{name}": value for name, value in _parts(grades).items()}


def _parts(grades: Sequence[Grade]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for grade in grades:
        for name, value in grade.parts.items() if grade.reward is not None else ():
            values[name].append(value)
    return {name: float(np.mean(known)) for name, known in values.items()}


def _share_correct(grades: Sequence[Grade]) -> float | None:
    known = [grade.correct for grade in grades if grade.correct is not None]
    return float(np.mean(known)) if known else None


def held_out_figures(
    scores: Mapping[str, Scores],
    measure: str | None,
    grades: Sequence[Grade],
    trajectories: Sequence[Trajectory],
    ways: int,
) -> dict[str, Any]:
    """Fields of a step's report of held-out prompts, each answered ``ways`` times in a row, greedily at first.

    ``held_out_figures`` are the means of ``scores``, which are :func:`held_out_scores`, the greedy answers' tokens, and
    how many gradings ``failed``. ``held_out`` has :func:`held_out_value`; it is left out where nothing was graded.
    """
    figures = {
        "tokens": float(np.mean([len(one.logprobs) for one in trajectories[::ways]])),
        "failed": failed_gradings(grades),
    }
    value = held_out_value(scores, measure)
    known = {} if value is None else {"held_out": {"all": value}}
    means = {name: one.mean for name, one in scores.items() if one.mean is not None}
    return {**known, "held_out_figures": {**means, **figures}}


def held_out_scores(grades: Sequence[Grade], ways: int) -> dict[str, Scores]:
    """By metric, of each held-out prompt, answered ``ways`` times in a row, greedily at first.

    Of the greedy answer ``pass@1``, where a grader says what is right, ``reward``, and its parts as ``reward/<name>``;
    of the others, beside ``pass@1`` alone, ``sampled_pass@k`` for k of 1 and of all that were drawn.

    A failed grading says nothing of its answer, good or bad. It has no weight in a mean (nor does a prompt that fewer
    than k graded answers are left of), and is counted beside it: :func:`failed_gradings`. Where a grader failed that
    weighs nothing in the reward, its own part has no weight, nor has what is right if only it says so.
    """
    greedy = grades[::ways]
    graded = np.array([grade.reward is not None for grade in greedy], np.float64)
    found, parts = {}, dict.fromkeys(name for grade in greedy for name in grade.parts)
    if any(grade.correct is not None for grade in greedy):
        judged = np.array([_is_judged(grade) for grade in greedy], np.float64)
        found["pass@1"] = Scores(np.array([float(bool(grade.correct)) for grade in greedy]), judged, unit="share")
    found["reward"] = Scores(np.array([grade.reward or 0.0 for grade in greedy]), graded)
    if "pass@1" in found:
        found |= _sampled_pass_rates([grades[i + 1 : i + ways] for i in range(0, len(grades), ways)])
    for name in parts:
        said = np.array([name in grade.parts for grade in greedy]) * graded
        found[f"reward/{name}"] = Scores(np.array([grade.parts.get(name, 0.0) for grade in greedy]), said)
    return found


def _is_judged(grade: Grade) -> bool:
    return grade.reward is not None and grade.correct is not None


def _sampled_pass_rates(drawn: Sequence[Sequence[Grade]]) -> dict[str, Scores]:
    """``sampled_pass@k`` of the grades of each prompt's drawn answers; empty where none were drawn."""
    most = len(drawn[0])
    graded = [[grade for grade in each if _is_judged(grade)] for each in drawn]
    right = [sum(bool(grade.correct) for grade in each) for each in graded]
    found = {}
    for k in sorted({1, most}) if most else []:
        enough = [len(each) >= k for each in graded]
        of_each = zip(graded, right, enough, strict=True)
        rates = [pass_at_k(len(each), count, k) if known else 0.0 for each, count, known in of_each]
        found[f"sampled_pass@{k}"] = Scores(np.array(rates), np.array(enough, np.float64), unit="share")
    return found


def measure_of(scores: Mapping[str, Scores]) -> str | None:
    """What looks at held-out prompts are compared by: a key of ``MEASURES``, pass@1 where a grader says what is right;
    None where nothing was graded. A run keeps to its first one, for one is not comparable with the other."""
    if scores["reward"].mean is None:
        return None
    return "pass@1" if "pass@1" in scores else "reward"


def held_out_value(scores: Mapping[str, Scores], measure: str | None) -> float | None:
    """What ``MEASURES`` says of the measure, None where nothing was graded."""
    if measure is None or measure not in scores or (found := scores[measure].mean) is None:
        return None
    return 1.0 - found if measure == "pass@1" else -found


def failed_gradings(grades: Sequence[Grade]) -> float:
    """How many there are, of all answers."""
    return float(sum(grade.reward is None for grade in grades))


def shown_answers(groups: Sequence[Group], version: int, count: int) -> list[dict[str, Any]]:
    """The best, the worst and a random answer of the batch's first groups, to be read by a person; of episodes
    their ``turns``, too."""
    shown = []
    for group in groups[:count]:
        ranked = sorted(group.graded, key=lambda number: group.grades[number].reward or 0.0)
        drawn = random.Random(f"{version}/{group.visit}").randrange(len(ranked))  # the same again after a resume
        places = {"worst": 0, "random": drawn, "best": len(ranked) - 1}
        for kind, place in places.items():
            one, grade = group.trajectories[ranked[place]], group.grades[ranked[place]]
            shown.append(
                {
                    "version": version,
                    "kind": kind,
                    "prompt": str(group.prompt.messages[-1].get("content", "")),
                    "row": group.prompt.name,
                    "answer": one.answer.text,
                    "expected": one.answer.expected,
                    "reward": grade.reward,
                    "parts": dict(grade.parts),
                    "tokens": one.answer.tokens,
                    "finished": one.finished,
                    "turns": one.answer.extra.get("turns"),
                }
            )
    return shown


class Busy:
    """How long somebody has worked in all, what is being worked at now included. One works, any thread may look."""

    def __init__(self) -> None:
        # One object, so that who looks from another thread sees both as they belong together.
        self._worked: tuple[float, float | None] = (0.0, None)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """What is within is work."""
        self._worked = self._worked[0], time.perf_counter()
        try:
            yield
        finally:
            self._worked = self.seconds, None

    @property
    def seconds(self) -> float:
        """Until now."""
        before, since = self._worked
        return before if since is None else before + time.perf_counter() - since


class Times:
    """Seconds by phase of the controller's own path, and how busy each role was meanwhile; of one batch."""

    def __init__(self) -> None:
        self.begin(0.0, 0.0)

    def begin(self, engine_seconds: float, grader_seconds: float) -> None:
        """A new batch begins. What either has worked since the one before is of neither: the first look at the policy,
        batches ahead while a checkpoint was written."""
        self._begun = time.perf_counter()
        self._before = engine_seconds, grader_seconds
        self._parts: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is within as ``name``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - begun

    def figures(self, engine_seconds: float, grader_seconds: float) -> dict[str, float]:
        """``time/<phase>_seconds`` and ``time/batch_seconds``, ``idle/<role>`` as shares of the batch's time.

        Args:
            engine_seconds, grader_seconds: how long either has worked in all.
        """
        whole = max(time.perf_counter() - self._begun, 1e-9)
        engine, grader = engine_seconds - self._before[0], grader_seconds - self._before[1]
        policy = sum(self._parts[name] for name in ("update", "old_logprobs"))
        busy = {"rollout": engine, "reward": grader, "policy": policy}
        return {
            **{f"time/{name}_seconds": seconds for name, seconds in self._parts.items()},
            "time/batch_seconds": whole,
            **{f"idle/{role}": max(0.0, 1 - seconds / whole) for role, seconds in busy.items()},
        }
