"""The embedded rollout engine (``rl.roles.RolloutRole``) over our own definitions, in this process.

Each step runs one token of every running sequence in one forward; sequences that end leave their slots, and waiting
requests enter them in the next step. Requests with equal prompts share one forward of the prompt, whose keys, values
and states are copied for each. Prompts are run whole: the others wait for them.

A push does not stop what runs: sequences go on with the new weights over the keys and values that the old ones left, as
vLLM does and as PipelineRL (Piche et al. 2025) trains with. ``Completion.versions`` says which weights drew each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import RolloutError
from posttrain_lib.evaluation.generation import next_logits, token_logprobs
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.rl.engine.condition import Condition
from posttrain_lib.rl.engine.drawing import next_tokens
from posttrain_lib.rl.engine.requests import check_requests, check_sequences
from posttrain_lib.rl.engine.sequences import Prompt, Running, Waiting, allowed_ids
from posttrain_lib.rl.engine.stop_strings import Decode
from posttrain_lib.rl.engine.weights import take_weights
from posttrain_lib.rl.sync_guard import Digest
from posttrain_lib.schema.rollouts import Completion, Request

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import ModelSpec

#: places in the cache of one forward of prompts, each as long as the longest of them; bounds memory
_PLACES_PER_FORWARD = 8192
#: tokens that the slots have room for at first; it doubles as sequences grow
_FIRST_ROOM = 64


@dataclass(frozen=True)
class _Entered:
    """A prompt that was run: a cache of it alone, and the logits [1, V] behind it."""

    prompt: Prompt
    cache: KeyValueCache
    logits: Tensor


class EmbeddedEngine(Condition):
    """Continuous batching over a decoder. One caller at a time.

    The model is the engine's own: ``push`` writes into its parameters. Memory grows with the longest sequence that
    runs: ``slots`` times its length, in every layer.
    """

    def __init__(
        self,
        model: Decoder,
        spec: ModelSpec,
        *,
        window: int,
        slots: int,
        version: int = 0,
        decode: Decode | None = None,
    ) -> None:
        """Make an engine with nothing to do.

        Args:
            model: the decoder of ``spec``, with weights of ``version``.
            window: most tokens of a prompt and its completion together.
            slots: most sequences that run at once.
            decode: tokens -> text, for stop strings; None: requests have none.
        """
        self.version = version
        self._model, self._spec, self._window, self._slots, self._decode = model, spec, window, slots, decode
        self._waiting = Waiting()
        self._running: list[Running] = []
        self._keys: set[str] = set()
        self._cache = self._empty_cache()
        self._entered: _Entered | None = None
        self._rope_bounds = model.config.rope_bounds

    def submit(self, requests: Sequence[Request]) -> None:
        """See ``rl.roles.RolloutRole.submit``; none is taken where one is refused."""
        self._check_usable()
        vocab_size = self._spec.config.vocab_size
        has_text = self._decode is not None
        check_requests(requests, self._keys, window=self._window, vocab_size=vocab_size, has_text=has_text)
        for request in requests:
            if request.allowed is not None:
                allowed_ids(request, [], vocab_size)
        for request in requests:
            self._waiting.add(request)
            self._keys.add(request.key)

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not come back."""
        return len(self._keys)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token of every sequence that runs or enters; the completions that ended.

        Raises:
            RolloutError: a constraint allows nothing, logits are not finite, or the last push failed. A request whose
                constraint does stays where it is and may be aborted.
        """
        self._check_usable()
        vocab_size = self._spec.config.vocab_size
        allowed = [sequence.allowed(vocab_size) for sequence in self._running]
        logits = [self._decoded()] if self._running else []
        for prompts, cache, behind in self._prompts(self._waiting.take(self._slots - len(self._running))):
            numbers = [number for number, (_, requests) in enumerate(prompts) for _ in requests]
            self._cache.grow(self._room(cache.capacity))
            self._cache.join(cache, numbers)
            entering = [Running(request, self._window, self._decode) for _, each in prompts for request in each]
            self._running += entering
            allowed += [sequence.allowed(vocab_size) for sequence in entering]
            logits.append(behind[numbers])
        return self._sampled(torch.cat(logits), allowed) if self._running else []

    @torch.inference_mode()
    def abort(self, keys: Iterable[str] | None = None) -> list[Completion]:
        """See ``rl.roles.RolloutRole.abort``."""
        asked = self._keys & set(keys) if keys is not None else set(self._keys)
        places = [place for place, sequence in enumerate(self._running) if sequence.request.key in asked]
        ended = [self._running[place].completion("aborted") for place in places]
        waiting = self._waiting.remove(asked)
        ended += [Running(request, self._window, self._decode).completion("aborted") for request in waiting]
        self._leave(places)
        self._keys -= asked
        return ended

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """See ``rl.roles.RolloutRole.push``. After an error the engine refuses to work until a push succeeds: some of
        its weights are new, some old."""
        self._check_open()
        self._entered = None
        self._unusable = f"the push of version {version} failed"
        received = Digest()
        take_weights(self._model, self._spec, received.through(weights))
        self.version, self._unusable = version, None
        return received.text()

    def logprobs(self, sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[np.ndarray]:
        """See ``rl.roles.RolloutRole.logprobs``."""
        self._check_usable()
        check_sequences(sequences, begins, window=self._window, vocab_size=self._spec.config.vocab_size)
        return [np.array(values, dtype=np.float32) for values in token_logprobs(self._model, sequences, begins)]

    def sleep(self) -> None:
        """Give the cache away; the weights stay."""
        self._check_may_sleep()
        self._cache, self._entered = self._empty_cache(), None

    def wake(self) -> None:
        """Nothing to do: the cache grows again as it is needed."""
        self._check_open()

    def close(self) -> None:
        """Give cache and requests up."""
        self.abort()
        self._cache, self._entered = self._empty_cache(), None
        self._closed = True

    def _decoded(self) -> Tensor:
        """Logits [n, V] behind the last token of every running sequence."""
        lengths = self._cache.lengths.tolist()
        self._cache.grow(self._room(max(lengths) + 1))
        new: list[Sequence[int]] = [sequence.tokens[-1:] for sequence in self._running]
        for place, (length, sequence) in enumerate(zip(lengths, self._running, strict=True)):
            if length == 0 or length in self._rope_bounds:  # nothing is kept, or nothing that the next token can use
                self._cache.forget([place])
                new[place] = [*sequence.request.prompt_ids, *sequence.tokens]
                self._cache.grow(self._room(len(new[place])))
        return next_logits(self._model, new, self._cache)

    def _prompts(
        self, groups: Sequence[tuple[Prompt, list[Request]]]
    ) -> Iterator[tuple[Sequence[tuple[Prompt, list[Request]]], KeyValueCache, Tensor]]:
        """(groups, a cache of their prompts, logits [groups, V] behind them), some groups at a time.

        The last prompt is kept where requests still wait for it: their slots are not free yet.
        """
        if groups and self._entered and groups[0][0] == self._entered.prompt:
            yield groups[:1], self._entered.cache, self._entered.logits
            groups = groups[1:]
        for chunk in _chunks(groups):
            prompts = [prompt for prompt, _ in chunk]
            cache = KeyValueCache(len(prompts), max(map(len, prompts)))
            logits = next_logits(self._model, prompts, cache)
            yield chunk, cache, logits
            if prompts[-1] in self._waiting:
                cache.reorder([len(prompts) - 1])
                self._entered = _Entered(prompts[-1], cache, logits[-1:])
        if self._entered and self._entered.prompt not in self._waiting:
            self._entered = None

    def _sampled(self, logits_nV: Tensor, allowed: Sequence[np.ndarray | None]) -> list[Completion]:
        """Draw a token of every sequence; those that end with it leave."""
        temperatures = [sequence.request.sampling.temperature for sequence in self._running]
        draws = [sequence.draw() for sequence in self._running]
        tokens, logprobs = next_tokens(_masked(logits_nV, allowed), temperatures, draws)
        wrong = [place for place, logprob in enumerate(logprobs) if logprob != logprob]
        if wrong:
            self._unusable = f"weights of version {self.version} give logits that are not finite"
            # What they left in the cache is no better: with other weights each sequence is run whole.
            self._cache.forget(range(len(self._running)))
            raise RolloutError(
                "the model's logits are not finite",
                where=f"request {self._running[wrong[0]].request.key}, weights of version {self.version}",
                got=f"{len(wrong)} of {len(logprobs)} sequences",
                fix="push weights from before the model broke",
            )
        ended, places = [], []
        for place, (sequence, token, logprob) in enumerate(zip(self._running, tokens, logprobs, strict=True)):
            finish = sequence.take(token, logprob, self.version)
            if finish is not None:
                ended.append(sequence.completion(finish))
                places.append(place)
        self._leave(places)
        self._keys.difference_update(completion.key for completion in ended)
        return ended

    def _leave(self, places: Sequence[int]) -> None:
        if places:
            self._running = [self._running[old] for old in self._cache.remove(places)]

    def _room(self, tokens: int) -> int:
        """Tokens to make room for where ``tokens`` are needed: growing copies all, so it is done seldom."""
        if tokens <= self._cache.capacity:
            return self._cache.capacity
        return min(self._window, max(tokens, 2 * self._cache.capacity))

    def _empty_cache(self) -> KeyValueCache:
        return KeyValueCache(0, min(_FIRST_ROOM, self._window), rows=self._slots)


def _chunks(groups: Sequence[tuple[Prompt, list[Request]]]) -> Iterator[list[tuple[Prompt, list[Request]]]]:
    """Runs of groups whose prompts go through one forward; at least one each."""
    chunk: list[tuple[Prompt, list[Request]]] = []
    longest = 0
    for group in groups:
        reach = max(longest, len(group[0]))
        if chunk and (len(chunk) + 1) * reach > _PLACES_PER_FORWARD:
            yield chunk
            chunk, reach = [], len(group[0])
        chunk.append(group)
        longest = reach
    if chunk:
        yield chunk


def _masked(logits_nV: Tensor, allowed: Sequence[np.ndarray | None]) -> Tensor:
    """The logits with -inf at what a sequence does not allow."""
    bound = [place for place, ids in enumerate(allowed) if ids is not None]
    if not bound:
        return logits_nV
    rows = torch.full((len(bound), logits_nV.shape[1]), float("-inf"), dtype=logits_nV.dtype, device=logits_nV.device)
    for row, place in zip(rows, bound, strict=True):
        ids = torch.as_tensor(allowed[place], device=logits_nV.device)
        row[ids] = logits_nV[place, ids]
    masked = logits_nV.clone()
    masked[bound] = rows
    return masked
