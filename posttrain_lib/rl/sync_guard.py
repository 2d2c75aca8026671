"""Proof that an engine samples from the trainer's weights, after every push.

Two checks, for two places where it goes wrong. The digest is made on both sides while the tensors stream by: what was
sent is what arrived. Canaries, token sequences that trainer and engine both score, show what became of it behind the
engine's door: a layer left out, two weights in each other's place, old ones that stayed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.roles import RolloutRole

#: sequences -> of each one the log-probabilities, at temperature 1, of its tokens from the second on
Score = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]


class Digest:
    """A checksum of named tensors, whatever their order: of each one's bytes, bound to its name, dtype and shape.

    CRC-32 of the bytes: of what is at hand on a CPU the fastest by far (4.2 GB/s on one core; SHA-256 1.8, BLAKE2b 0.9,
    ``checkpoint.weights_digest`` 0.5), and enough for accidents. It is no signature against somebody who searches for a
    collision.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[str, list[int], int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Count a tensor, of any dtype and device."""
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        self._sums[name] = (str(tensor.dtype), list(tensor.shape), zlib.crc32(data.data))

    def through(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, each counted before it is passed on."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def text(self) -> str:
        """SHA-256, in hex, over what was counted."""
        return hashlib.sha256(json.dumps(self._sums, sort_keys=True).encode()).hexdigest()


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of these weights; reads each once."""
    digest = Digest()
    for name, tensor in weights:
        digest.add(name, tensor)
    return digest.text()


@dataclass(frozen=True)
class Synced:
    """A push that was proved: ``difference`` is the largest of a canary token's log-probabilities, trainer's and
    engine's."""

    version: int
    digest: str
    difference: float


class SyncGuard:
    """Pushes weights and stops the run where the engine does not have them afterwards."""

    def __init__(self, canaries: Sequence[Sequence[int]], *, bound: float) -> None:
        """Keep the canaries.

        Args:
            canaries: sequences of two tokens or more, not longer than the engine's window; such as training meets.
            bound: largest difference of a token's log-probabilities that rounding explains: measured between the
                trainer's arithmetic and this engine's.
        """
        self._canaries, self._bound = [list(canary) for canary in canaries], bound
        self._before: tuple[str, np.ndarray] | None = None

    def push(self, engine: RolloutRole, weights: Iterable[tuple[str, Tensor]], version: int, score: Score) -> Synced:
        """Give the engine the trainer's weights and prove that it samples from them.

        Args:
            score: the trainer's own model, with these weights.

        Raises:
            RolloutError: the engine refused the weights, received others, has another version, scores the canaries as
                before although the weights changed, or otherwise than the trainer.
        """
        sending = Digest()
        received = engine.push(sending.through(weights), version)
        sent = sending.text()
        if received != sent:
            raise _failed("digest", version, got=received, expected=sent)
        if engine.version != version:
            raise _failed("version", version, got=engine.version, expected=version)
        found = np.concatenate(engine.logprobs(self._canaries, [1] * len(self._canaries)))
        wanted = np.concatenate(list(score(self._canaries)))
        if self._before is not None and self._before[0] != sent and np.array_equal(self._before[1], found):
            raise _failed(
                "canary", version, got="the log-probabilities of the weights before", expected="other ones, as sent"
            )
        difference = float(np.abs(found - wanted).max())
        if not difference <= self._bound:
            raise _failed(
                "canary",
                version,
                got=f"log-probabilities {difference:.3g} from the trainer's",
                expected=f"at most {self._bound:g}",
            )
        self._before = sent, found
        return Synced(version, sent, difference)


def _failed(check: str, version: int, *, got: object, expected: object) -> RolloutError:
    return RolloutError(
        "the engine does not have the trainer's weights",
        where=f"push of version {version}, {check}",
        got=got,
        expected=expected,
        fix="look for what changes, drops or keeps back tensors between trainer and engine; a canary's bound must "
        "also cover the rounding of the engine's dtype",
    )
