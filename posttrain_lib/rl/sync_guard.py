"""Proof that an engine samples from the trainer's weights, after every push.

Two checks, for two places where it goes wrong. The digest is made on both sides while the tensors stream by: what was
sent is what arrived. Canaries, token sequences that trainer and engine both score, show what became of it behind the
engine's door: a layer left out, two weights in each other's place, old ones that stayed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain_lib.errors import RolloutError
from posttrain_lib.ops.splitmix import STEP, mixed_
from posttrain_lib.rl.roles import RolloutRole

#: sequences -> of each one the log-probabilities, at temperature 1, of its tokens from the second on
Score = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]

#: how far the trainer's own log-probabilities of canaries must have moved for an engine's equal ones to be old, in
#: nats, and in parts of how far engine and trainer are apart by rounding: an update, as those at the end of a schedule,
#: may be too small for any bit to show. Of a third of a million weights in bfloat16, 0.01 apart, those of the engine
#: were equal up to 3e-6, and other ones from 7e-6 on; in float32 up to nothing
_SHOWS, _SHOWS_OF_ROUNDING = 2e-6, 1e-3
#: 64-bit words of a row of what the digest sums
_ROW = 512


class Digest:
    """A checksum of named tensors, whatever their order: of each one's bytes, bound to its name, dtype and shape.

    The bytes are read as 64-bit words in rows; what counts are the sums of the rows and of the columns, modulo 2^64,
    and the words behind the last row, each mixed with its place. Sums, for any device makes them about as fast as it
    reads; mixed, for in a weighted sum changes of the words' highest bits cancel, and there every fourth sign of a
    bfloat16 tensor is. A tensor stays on its device, and only one number of it leaves it. It finds accidents: it does
    not see what leaves every row's and every column's sum as it was, and is no signature against somebody who wants
    that.
    """

    def __init__(self) -> None:
        self._about: dict[str, tuple[str, list[int]]] = {}
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Count a tensor, of any dtype and device."""
        self._about[name] = (str(tensor.dtype), list(tensor.shape))
        self._sums[name] = list(_sums(tensor))

    def through(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, each counted before it is passed on."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def text(self) -> str:
        """SHA-256, in hex, over what was counted."""
        found = {name: [*self._about[name], number] for name, number in self._numbers().items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def _numbers(self) -> dict[str, int]:
        """One number for each tensor; a device is waited for once, and asked for little."""
        by_device: dict[torch.device, list[str]] = {}
        for name, parts in self._sums.items():
            by_device.setdefault(parts[0].device, []).append(name)
        return {name: number for device, names in by_device.items() for name, number in self._on(device, names)}

    def _on(self, device: torch.device, names: list[str]) -> Iterator[tuple[str, int]]:
        sums = torch.cat([part for name in names for part in self._sums[name]])
        lengths = [sum(map(len, self._sums[name])) for name in names]
        places = torch.arange(1, max(lengths) + 1, device=device).mul_(STEP)
        mixed = mixed_(sums.add_(torch.cat([places[:length] for length in lengths])))
        ends = torch.tensor(lengths).cumsum(0).to(device)
        totals = torch.cat([mixed.new_zeros(1), mixed.cumsum(0)])[ends]
        yield from zip(names, totals.diff(prepend=totals.new_zeros(1)).tolist(), strict=True)


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """int64 [n] each: the sums of rows and columns, and the words behind the last whole row."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) - len(data) % (8 * _ROW)
    if whole:
        rows = data[:whole].view(torch.int64).view(-1, _ROW)
        yield rows.sum(1)
        yield rows.sum(0)
    if whole < len(data) or not whole:
        yield pad(data[whole:], (0, -len(data) % 8)).view(torch.int64)


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
        # digest, engine's and trainer's log-probabilities of the last push that changed the engine's
        self._before: tuple[str, np.ndarray, np.ndarray] | None = None

    def push(self, engine: RolloutRole, weights: Iterable[tuple[str, Tensor]], version: int, score: Score) -> Synced:
        """Give the engine the trainer's weights and prove that it samples from them.

        Args:
            score: the trainer's own model, with these weights.

        Raises:
            RolloutError: the engine refused the weights, received others, has another version, scores the canaries as
                before although the trainer does not, or otherwise than the trainer.
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
        equal = self._before is not None and np.array_equal(self._before[1], found)
        if self._before is not None and equal and sent != self._before[0]:
            _, before, known = self._before
            if _apart(known, wanted) > max(_SHOWS, _SHOWS_OF_ROUNDING * _apart(known, before)):
                raise _failed(
                    "canary", version, got="the log-probabilities of the weights before", expected="other ones, as sent"
                )
        difference = _apart(found, wanted)
        if not difference <= self._bound:
            raise _failed(
                "canary",
                version,
                got=f"log-probabilities {difference:.3g} from the trainer's",
                expected=f"at most {self._bound:g}",
            )
        if not equal:  # else what was too small to show adds up
            self._before = sent, found, wanted
        return Synced(version, sent, difference)


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def _failed(check: str, version: int, *, got: object, expected: object) -> RolloutError:
    return RolloutError(
        "the engine does not have the trainer's weights",
        where=f"push of version {version}, {check}",
        got=got,
        expected=expected,
        fix="look for what changes, drops or keeps back tensors between trainer and engine; a canary's bound must "
        "also cover the rounding of the engine's dtype",
    )
