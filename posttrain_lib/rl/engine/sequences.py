"""Requests in the embedded engine: those that wait, by prompt, and those that run."""

from __future__ import annotations

from collections import deque
from typing import Literal

import numpy as np

from posttrain_lib.errors import RolloutError
from posttrain_lib.evaluation.sampling import Stream
from posttrain_lib.rl.engine.stop_strings import Decode, StopStrings
from posttrain_lib.schema.rollouts import Completion, Request

Prompt = tuple[int, ...]


class Waiting:
    """Requests in the order in which their prompts came first: those of one prompt enter together, as slots allow."""

    def __init__(self) -> None:
        self._by_prompt: dict[Prompt, deque[Request]] = {}

    def __contains__(self, prompt: Prompt) -> bool:
        """Whether a request with this prompt waits."""
        return prompt in self._by_prompt

    def add(self, request: Request) -> None:
        """Behind the others."""
        self._by_prompt.setdefault(request.prompt_ids, deque()).append(request)

    def take(self, count: int) -> list[tuple[Prompt, list[Request]]]:
        """The next requests, at most ``count``; only those of the last prompt may not be all that wait for it."""
        taken = []
        for prompt in list(self._by_prompt):
            if count == 0:
                break
            queue = self._by_prompt[prompt]
            requests = [queue.popleft() for _ in range(min(count, len(queue)))]
            count -= len(requests)
            taken.append((prompt, requests))
            if not queue:
                del self._by_prompt[prompt]
        return taken

    def remove(self, keys: set[str]) -> list[Request]:
        """Take these requests out."""
        removed = [request for queue in self._by_prompt.values() for request in queue if request.key in keys]
        kept = {
            prompt: deque(request for request in queue if request.key not in keys)
            for prompt, queue in self._by_prompt.items()
        }
        self._by_prompt = {prompt: queue for prompt, queue in kept.items() if queue}
        return removed


class Running:
    """One request and what was sampled for it."""

    def __init__(self, request: Request, window: int, decode: Decode | None) -> None:
        sampling = request.sampling
        self.request = request
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._most = min(sampling.max_new_tokens, window - len(request.prompt_ids))
        self._stream = Stream(request.seed)
        self._drawn: float | None = None
        strings = sampling.stop_strings
        self._watch = StopStrings(strings, decode) if strings and decode is not None else None

    def draw(self) -> float:
        """The next token's number, of the request's own stream: the same until that token is there, for a step may fail
        behind it."""
        if self._drawn is None:
            self._drawn = self._stream.draw()
        return self._drawn

    def allowed(self, vocab_size: int) -> np.ndarray | None:
        """Ids that may come next, None: any.

        Raises:
            RolloutError: nothing may, or an id that no token has.
        """
        return None if self.request.allowed is None else allowed_ids(self.request, self.tokens, vocab_size)

    def take(self, token: int, logprob: float, version: int) -> Literal["stop", "length"] | None:
        """Add a token; how the completion ends with it, None: it goes on."""
        self._drawn = None
        self.tokens.append(token)
        self._logprobs.append(logprob)
        self._versions.append(version)
        if token in self.request.sampling.stop_ids or (self._watch and self._watch.found(self.tokens)):
            return "stop"
        return "length" if len(self.tokens) == self._most else None

    def completion(self, finish: Literal["stop", "length", "aborted"]) -> Completion:
        """What became of the request."""
        return Completion(
            self.request.key,
            np.array(self.tokens, dtype=np.int32),
            np.array(self._logprobs, dtype=np.float32),
            np.array(self._versions, dtype=np.int32),
            finish,
        )


def allowed_ids(request: Request, sampled: list[int], vocab_size: int) -> np.ndarray | None:
    """What a request's constraint says, looked at.

    Raises:
        RolloutError: nothing may come next, an id that no token has, or no ids in ascending order.
    """
    assert request.allowed is not None
    ids = request.allowed.after(sampled)
    if ids is None:
        return None
    # The bounds below are of the first and the last; a mask, or an id twice, would be other sets to the trainer.
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 1 or not (ids[:-1] < ids[1:]).all():
        raise RolloutError(
            "a request's allowed tokens are not ascending ids",
            where=f"request {request.key}, behind {len(sampled)} sampled tokens {sampled[-8:]}",
            got=repr(ids)[:200],
            expected="numpy int64 of one dimension, each id above the one before",
        )
    if len(ids) == 0 or ids[0] < 0 or ids[-1] >= vocab_size:
        raise RolloutError(
            "a request's allowed tokens leave nothing to sample"
            if len(ids) == 0
            else "a request allows a token that the model does not have",
            where=f"request {request.key}, behind {len(sampled)} sampled tokens {sampled[-8:]}",
            got=ids.tolist()[-8:],
            expected=f"at least one id, each from 0 to {vocab_size - 1}",
            fix="make what ends the constraint a stop token of the request, and its ids those of this tokenizer",
        )
    return ids
