"""From what a sample's tokens were drawn from to a batch's :class:`AllowedSets`: the constraint is asked again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from posttrain_lib.errors import DataError
from posttrain_lib.schema.allowed_sets import AllowedSets
from posttrain_lib.schema.rollouts import TrainSample


def allowed_sets(samples: Sequence[TrainSample]) -> AllowedSets:
    """The sets of the samples' trained tokens, sample after sample.

    Raises:
        DataError: a sampled token is none of those that its constraint allows.
    """
    known: dict[bytes, int] = {}
    sets: list[np.ndarray] = []
    set_of = []
    for sample in samples:
        for ids in _of_sample(sample):
            if ids is None:
                set_of.append(-1)
                continue
            number = known.setdefault(ids.tobytes(), len(sets))
            if number == len(sets):
                sets.append(ids)
            set_of.append(number)
    order = np.argsort([len(ids) for ids in sets], kind="stable")
    # One more than there are sets: -1, no set, stays what it is.
    rank = np.full(len(sets) + 1, -1, np.int64)
    rank[order] = np.arange(len(sets))
    ordered = [sets[number] for number in order]
    return AllowedSets(
        set_of=rank[np.array(set_of, np.int64)],
        ids=np.concatenate([np.zeros(0, np.int64), *ordered]),
        offsets=np.append(0, np.cumsum([len(ids) for ids in ordered], dtype=np.int64)),
    )


def _of_sample(sample: TrainSample) -> Iterator[np.ndarray | None]:
    """The set of each trained token, in order. Trained tokens that stand together are one completion: between two of
    them there is at least a header."""
    places = np.flatnonzero(sample.trained)
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        tokens = sample.token_ids[run].tolist()
        for place, token in enumerate(tokens):
            ids = None if sample.allowed is None else sample.allowed.after(tokens[:place])
            if ids is not None and token not in ids:
                raise DataError(
                    "a sampled token is none of those that its constraint allows",
                    where=f"sample {sample.index} of group {sample.group}, trained token {place} of a completion",
                    got=token,
                    expected=f"one of {ids[:8].tolist()} ({len(ids)} ids)",
                    fix="a constraint has to say the same whenever it is asked",
                )
            yield None if ids is None else np.asarray(ids, np.int64)
