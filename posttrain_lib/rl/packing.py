"""Samples of groups become packed micro-batches: a group's prompt is computed once, its completions stand behind it.

    group --split where a row ends--> units --best fit--> rows --deal_out--> this rank's rows --> micro-batches

A unit is as much of a group as fits into a row: its first sample whole, the others without the prompt that they share
with it, save for the prompt's last token, which predicts their first one. Micro-batches are as long as their longest
row and hold no other padding. Everything is a function of the samples, the same on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain_lib.data.assemble import Fill, PackedArrays, Segments, assemble
from posttrain_lib.data.balance import deal_out
from posttrain_lib.data.packing import Rows, make_packer
from posttrain_lib.errors import DataError
from posttrain_lib.rl.allowed_sets import allowed_sets
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.rollouts import TrainSample


@dataclass(frozen=True)
class PackedSamples:
    """One rank's share of some samples.

    ``micro_batches`` are numpy batches whose ``document_ids`` count the samples from 0; every rank has equally many.
    Over all ranks: ``tokens`` that are computed (shared ones once), ``slots`` with padding, ``whole_tokens`` of the
    samples one by one, as they would be without sharing.
    """

    micro_batches: list[PackedBatch]
    tokens: int
    slots: int
    whole_tokens: int


@dataclass(frozen=True)
class _Units:
    """Parts of groups. ``samples`` int64 [samples], unit after unit; ``counts`` int64 [units] samples of each;
    ``firsts`` int32 [samples] tokens that each shares with the one before it; ``lengths`` int32 [units] tokens."""

    samples: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray
    lengths: np.ndarray


def pack_samples(
    samples: Sequence[TrainSample],
    *,
    row_tokens: int,
    micro_batch_rows: int = 1,
    rank: int = 0,
    world: int = 1,
    pair_cost: float = 0.0,
    share_prefixes: bool = True,
) -> PackedSamples:
    """This rank's micro-batches of the samples, with their signals and what they were drawn from.

    Args:
        samples: those of a group stand together.
        row_tokens: most tokens of a row. micro_batch_rows: most rows of a forward.
        rank, world: rows are dealt out so that ranks have equally many and about the same cost.
        pair_cost: cost of a query-key pair of attention in units of a token's other cost; see ``training.flops``.
        share_prefixes: off for models that cannot (``models.spec.can_share_prefixes``).

    Raises:
        DataError: a sample is longer than a row, has nothing to train, a signal of another length or with a number
            that is not finite, or a token that its constraint does not allow.
    """
    lengths = np.array([len(sample.token_ids) for sample in samples], np.int32)
    _check(samples, lengths, row_tokens)
    units = _units(samples, lengths, row_tokens, share_prefixes)
    packer = make_packer(row_tokens, len(units.counts) + 1)
    everything = len(units.counts) + 1
    fed = packer.feed(np.arange(len(units.counts)), units.lengths, everything)[1]
    rows = Rows.joined([fed, packer.flush(everything)])
    used = np.array([units.lengths[list(row)].sum() for row in rows], np.int64)
    per_rank = -(-len(rows) // world)
    rows = rows.filled_up(per_rank * world)
    used = np.append(used, np.zeros(per_rank * world - len(used), np.int64))
    costs = used + pair_cost * np.array([_pairs(units, lengths, row) for row in rows])
    # A rank's dearest first: a forward of several rows is as long as its longest.
    dealt = [sorted(each, key=lambda row: (-int(used[row]), row)) for each in deal_out(costs, world)]
    begins = range(0, per_rank, micro_batch_rows)
    chunks = [[each[first : first + micro_batch_rows] for first in begins] for each in dealt]
    batches = [_batch(samples, lengths, units, rows.take(chunk), _width(used, chunk)) for chunk in chunks[rank]]
    return PackedSamples(
        micro_batches=batches,
        tokens=int(used.sum()),
        slots=sum(_width(used, chunk) * len(chunk) for each in chunks for chunk in each),
        whole_tokens=int(lengths.sum()),
    )


def trained_in_order(sample: TrainSample) -> int:
    """How many of its tokens are trained, N."""
    return int(sample.trained.sum())


def by_sample(values: Sequence[np.ndarray], batches: Sequence[PackedBatch], samples: int) -> dict[int, np.ndarray]:
    """Numbers of the supervised tokens of some batches, [N] each, as {sample: its own}."""
    found: dict[int, np.ndarray] = {}
    for numbers, batch in zip(values, batches, strict=True):
        segments = np.searchsorted(batch.cu_seqlens, batch.supervised_index, side="right") - 1
        owners = batch.document_ids[segments]
        cuts = np.flatnonzero(np.diff(owners)) + 1
        for own, part in zip(np.split(owners, cuts), np.split(numbers, cuts), strict=True):
            if len(own):
                found[int(own[0])] = part
    if any(not 0 <= sample < samples for sample in found):
        raise ValueError(f"batches of other samples than these {samples}: {sorted(found)}")
    return found


def _check(samples: Sequence[TrainSample], lengths: np.ndarray, row_tokens: int) -> None:
    for sample, length in zip(samples, lengths.tolist(), strict=True):
        where, trained = f"sample {sample.index} of group {sample.group}", trained_in_order(sample)
        if length > row_tokens:
            raise DataError(
                "a sample does not fit into a packed row",
                where=where,
                got=f"{length} tokens",
                expected=f"at most {row_tokens} tokens (train.row_tokens)",
                fix="raise train.row_tokens, or lower the completion's tokens",
            )
        if not trained or sample.trained[: max(1, sample.prompt_tokens)].any():
            raise DataError(
                "a sample's trained tokens are not behind its prompt",
                where=where,
                got=f"{trained} trained tokens, a prompt of {sample.prompt_tokens}",
                expected="at least one, and none in the prompt or at the very beginning",
            )
        check_signals(sample)


def check_signals(sample: TrainSample) -> None:
    """Every signal is one finite number a trained token. A ratio to an infinite one is bounded as any other, and the
    KL that an update is refused for is over answers that are not stale: others' would be learned from.

    Raises:
        DataError: one is not, by name.
    """
    trained = trained_in_order(sample)
    for name, values in sample.signals.items():
        where = f"sample {sample.index} of group {sample.group}, {name}"
        if values.shape != (trained,):
            raise DataError(
                "a signal is not one number a trained token", where=where, got=values.shape, expected=(trained,)
            )
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(
                "a signal is no finite number",
                where=f"{where}, trained token {place}",
                got=float(values[place]),
                fix="look for NaN in what made it: the rollout engine, the policy, a reference, a teacher",
            )


def _units(samples: Sequence[TrainSample], lengths: np.ndarray, row_tokens: int, share: bool) -> _Units:
    """Cut the groups where a row would overflow: what is left of a group begins with the whole prompt again."""
    firsts, counts, totals = np.zeros(len(samples), np.int32), [], []
    room, group = 0, None
    for number, sample in enumerate(samples):
        length = int(lengths[number])
        # The prompt's last token predicts a completion's first one: it belongs to each of them.
        shared = min(sample.prompt_tokens, length) - 1 if share else 0
        if sample.group == group and shared > 0 and length - shared <= room:
            _check_prompt(samples[number - 1], sample, shared)
            firsts[number] = shared
            counts[-1] += 1
            totals[-1] += length - shared
            room -= length - shared
            continue
        group, room = sample.group, row_tokens - length
        counts.append(1)
        totals.append(length)
    return _Units(np.arange(len(samples)), np.array(counts, np.int64), firsts, np.array(totals, np.int32))


def _check_prompt(before: TrainSample, sample: TrainSample, shared: int) -> None:
    if not np.array_equal(before.token_ids[:shared], sample.token_ids[:shared]):
        raise DataError(
            "the samples of a group have different prompts",
            where=f"samples {before.index} and {sample.index} of group {sample.group}",
            expected=f"{shared + 1} equal tokens",
        )


def _members(units: _Units, row: Sequence[int]) -> np.ndarray:
    """Samples of a row's units, in order."""
    ends = np.cumsum(units.counts)
    parts = [units.samples[ends[unit] - units.counts[unit] : ends[unit]] for unit in row]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _pairs(units: _Units, lengths: np.ndarray, row: Sequence[int]) -> float:
    """Query-key pairs of a row: each token with those of its own document before it."""
    members = _members(units, row)
    whole, before = lengths[members].astype(np.float64), units.firsts[members].astype(np.float64)
    return float((whole**2 - before**2).sum() / 2)


def _width(used: np.ndarray, rows: Sequence[int]) -> int:
    """Tokens of the longest of the rows; one, where all are empty: a batch has at least a token of padding."""
    return max(1, int(used[list(rows)].max(initial=0)))


def _batch(samples: Sequence[TrainSample], lengths: np.ndarray, units: _Units, rows: Rows, width: int) -> PackedBatch:
    members = np.concatenate([_members(units, row) for row in rows]).astype(np.int64)
    per_row = np.array([units.counts[list(row)].sum() for row in rows], np.int64)
    firsts = units.firsts[members]
    segments = Segments(
        members, lengths[members] - firsts, firsts, np.zeros(len(members), np.int32), per_row, margins=None
    )
    (batch,) = assemble(segments, _filler(samples, segments), width, len(rows))
    ordered = [samples[sample] for sample in batch.document_ids if sample >= 0]
    # Of all samples: a batch of padding, too, has what the loss asks for, one number for none of its tokens.
    names = sorted({name for sample in samples for name in sample.signals})
    nothing = np.zeros(0, np.float32)
    signals = {name: np.concatenate([nothing, *(sample.signals[name] for sample in ordered)]) for name in names}
    return dataclasses.replace(
        batch,
        signals={name: each.astype(np.float32) for name, each in signals.items()},
        # The head goes another way where a batch has sets, on which the loss's own value depends: all batches alike.
        allowed=allowed_sets(ordered) if any(sample.allowed is not None for sample in samples) else None,
    )


def _filler(samples: Sequence[TrainSample], segments: Segments) -> Fill:
    """Copies the samples' own tokens to their places."""

    def fill(places: np.ndarray, into: PackedArrays) -> None:
        chosen = [samples[sample] for sample in segments.examples]
        if not chosen:
            return
        ends = np.cumsum([len(sample.token_ids) for sample in chosen])
        starts = ends - [len(sample.token_ids) for sample in chosen]
        tokens = np.concatenate([sample.token_ids for sample in chosen]).astype(np.int32)
        weights = np.concatenate([sample.trained for sample in chosen]).astype(np.float32)
        begins = starts.astype(np.int64) + segments.firsts
        into.lay_out(tokens, weights, begins, segments.lengths, segments.firsts, places)

    return fill
