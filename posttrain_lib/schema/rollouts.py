"""What passes between the roles of reinforcement learning: requests, completions, answers to grade, grades, samples.

Plain data of the host, numpy arrays for what is one number a token. Tokens go in and tokens come out: a text is made
for graders and for people, and never tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np


class AllowedTokens(Protocol):
    """Which tokens may come next: a trie over a catalogue, a state machine. Picklable, and without a state of its own,
    so that the trainer can ask again what the sampler was told."""

    def after(self, sampled: Sequence[int]) -> np.ndarray | None:
        """Ids that may follow the tokens sampled so far, int64, ascending, never empty; None: any."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    ``temperature`` divides the logits; 0 takes the most likely token, ties to the lowest id. There is no top-p or top-k
    here: a token's probability must be the one that the trainer computes. ``stop_strings`` end a completion behind the
    token that completes one; its tokens stay.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion that is wanted. ``key`` is unlike that of any other request in the engine; a request draws from
    ``seed`` (0 to 2**64 - 1) alone, whatever runs beside it. Requests with equal prompts may share their work."""

    key: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    allowed: AllowedTokens | None = None


@dataclass(frozen=True)
class Completion:
    """What a request became. One entry for each sampled token, R of them:

        token_ids  int32 [R]
        logprobs   float32 [R]  log-probability of the token at the request's temperature, among the allowed ones
        versions   int32 [R]    version of the weights that it was sampled from

    ``finish``: "stop" (a stop token or string, which is the end of the tokens), "length", or "aborted".
    """

    key: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Literal["stop", "length", "aborted"]


@dataclass(frozen=True)
class Answer:
    """A completion as graders see it.

    ``prompt`` are the messages that were answered, ``text`` the completion's own text without stop markers,
    ``expected`` the row's answer, ``extra`` its other fields; ``tokens`` sampled tokens, ``finished`` whether it came
    to its end.
    """

    prompt: tuple[Mapping[str, Any], ...]
    text: str
    expected: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True


@dataclass(frozen=True)
class Grade:
    """What an answer is worth.

    ``reward`` is the weighted sum of ``parts``; None where a grader failed, and ``failure`` says how: such an answer is
    counted and never trained on. ``parts`` are the graders' own values by name, before weights. ``correct``: whether
    the answer counts as solved for pass@k, None where no grader says.
    """

    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    correct: bool | None = None
    failure: str | None = None


@dataclass(frozen=True)
class TrainSample:
    """One trajectory to learn from, S tokens of which N are trained.

        token_ids  int32 [S]  prompt and everything behind it
        trained    bool [S]   tokens that the policy sampled; not those of the prompt or an environment
        signals    name -> float32 [N], one number for each trained token in order (see ``losses.policy``)

    ``allowed`` is the constraint that each completion in it was sampled under, if any.

    The samples of a ``group`` have their first ``prompt_tokens`` tokens in common, none of them trained. ``index``
    names the sample in messages.
    """

    token_ids: np.ndarray
    trained: np.ndarray
    prompt_tokens: int
    group: int
    index: int
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    allowed: AllowedTokens | None = None
