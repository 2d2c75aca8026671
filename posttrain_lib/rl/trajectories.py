"""From a prompt to what is learned: completions become trajectories, those of one prompt a group, groups samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posttrain_lib.losses.policy import ADVANTAGES, FRESH, ROLLOUT
from posttrain_lib.rl.constrain import Constrain
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.rewards.shaping import signal
from posttrain_lib.schema.rollouts import AllowedTokens, Answer, Completion, Grade, Request, Sampling, TrainSample

#: asks the engine
Complete = Callable[[Request], Awaitable[Completion]]
#: token ids -> text without control tokens
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt, S tokens of which the policy sampled N.

        token_ids  int32 [S]    the prompt, and everything behind it as it was, token for token
        trained    bool [S]     tokens that were sampled
        logprobs   float32 [N]  what the sampler said of them
        versions   int32 [N]    of the weights that each was sampled from

    ``answer`` is what graders see; ``finished``: it ended by itself, not by a limit. ``failure``: how its environment
    failed; such a trajectory is not graded. ``allowed``: the constraint that each completion in it was sampled under.
    """

    token_ids: np.ndarray
    prompt_tokens: int
    trained: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    answer: Answer
    finished: bool
    failure: str | None = None
    allowed: AllowedTokens | None = None


@dataclass(frozen=True)
class Group:
    """All answers to one visit of a prompt, graded."""

    visit: int
    prompt: RolloutPrompt
    trajectories: Sequence[Trajectory]
    grades: Sequence[Grade]

    @property
    def graded(self) -> list[int]:
        """Numbers of the answers whose grading did not fail, and of which something was sampled."""
        return [
            number
            for number, (grade, one) in enumerate(zip(self.grades, self.trajectories, strict=True))
            if grade.reward is not None and len(one.logprobs)
        ]

    @property
    def rewards(self) -> np.ndarray:
        """Float64, of the graded ones."""
        return np.array([self.grades[number].reward for number in self.graded], np.float64)

    @property
    def has_signal(self) -> bool:
        """Whether any answer was better than another."""
        return signal(self.rewards, np.zeros(len(self.graded), np.int64)).get(0, False)


class Player(Protocol):
    """How a prompt is answered."""

    async def __call__(
        self, prompt: RolloutPrompt, sampling: Sampling, seed: int, key: str, complete: Complete
    ) -> Trajectory:
        """The trajectory of one answer, drawn from ``seed`` alone; the keys of its requests begin with ``key``."""


@dataclass(frozen=True)
class Play:
    """A :class:`Player` that answers by one completion.

    Args:
        decode: of the run's tokenizer. constrain: what a prompt's completion may be; None: anything.
    """

    decode: Decode
    constrain: Constrain | None = None

    async def __call__(
        self, prompt: RolloutPrompt, sampling: Sampling, seed: int, key: str, complete: Complete
    ) -> Trajectory:
        """The trajectory of one answer."""
        allowed = None if self.constrain is None else self.constrain(prompt)
        done = await complete(Request(key, prompt.token_ids, sampling, seed, allowed))
        sampled, before = len(done.token_ids), len(prompt.token_ids)
        return Trajectory(
            token_ids=np.concatenate([np.asarray(prompt.token_ids, np.int32), done.token_ids.astype(np.int32)]),
            prompt_tokens=before,
            trained=np.arange(before + sampled) >= before,
            logprobs=done.logprobs.astype(np.float32),
            versions=done.versions.astype(np.int32),
            answer=Answer(
                prompt=prompt.messages,
                text=self.decode(done.token_ids.tolist()).strip(),
                expected=prompt.answer,
                extra=prompt.extra,
                tokens=sampled,
                finished=done.finish == "stop",
            ),
            finished=done.finish == "stop",
            allowed=allowed,
        )


def seed_for(run_seed: int, name: str, visit: int, number: int) -> int:
    """The stream of one answer: of the run, the prompt's name, its visit and the answer's number alone."""
    digest = hashlib.sha256(f"{run_seed} {visit} {number} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def to_grade(trajectories: Sequence[Trajectory]) -> list[Answer]:
    """The answers of those that did not fail."""
    return [one.answer for one in trajectories if one.failure is None]


def with_failures(trajectories: Sequence[Trajectory], grades: Sequence[Grade]) -> list[Grade]:
    """A grade for each: of what was :func:`to_grade` in order, and the failures of the others in their places."""
    given = iter(grades)
    return [next(given) if one.failure is None else Grade(None, failure=one.failure) for one in trajectories]


def samples_of(
    groups: Sequence[Group], advantages: Sequence[np.ndarray], version: int, *, mask_unfinished: bool
) -> list[TrainSample]:
    """What the policy learns from groups.

    Args:
        advantages: of each group, one number for each of its ``graded`` answers.
        version: of the policy that learns; an answer is fresh if all of it was drawn from that.
        mask_unfinished: leave answers out that were cut off by a limit: neither good nor bad is known of them.
    """
    samples = []
    for group, worth in zip(groups, advantages, strict=True):
        for number, advantage in zip(group.graded, worth, strict=True):
            one = group.trajectories[number]
            if mask_unfinished and not one.finished:
                continue
            signals = {
                ADVANTAGES: np.full(len(one.logprobs), advantage, np.float32),
                ROLLOUT: one.logprobs,
                FRESH: np.full(len(one.logprobs), (one.versions == version).all(), np.float32),
            }
            samples.append(
                TrainSample(one.token_ids, one.trained, one.prompt_tokens, group.visit, number, signals, one.allowed)
            )
    return samples


def with_teacher(samples: Sequence[TrainSample], teacher: Sequence[np.ndarray], weight: float) -> list[TrainSample]:
    """On-policy distillation (Agarwal et al. 2024, with the reverse KL's one-sample estimate at each token as reward).

    What is added to a token's advantage is ``weight * (log teacher - log sampler)``; the policy gradient of that is the
    gradient of ``KL(policy || teacher)`` at the states that the policy itself comes to.

    Args:
        teacher: float [N] of each sample, at the temperature of sampling.
    """
    taught = []
    for sample, known in zip(samples, teacher, strict=True):
        advantages = sample.signals[ADVANTAGES] + weight * (known - sample.signals[ROLLOUT])
        taught.append(
            dataclasses.replace(sample, signals={**sample.signals, ADVANTAGES: advantages.astype(np.float32)})
        )
    return taught
