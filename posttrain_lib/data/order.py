"""The order in which an epoch visits its rows: a pure function of what is visited, the seed and the epoch.

No permutation comes from a library's ``shuffle``, whose algorithm may change between versions, but from a keyed hash
(the SplitMix64 finaliser), sorted. It is the same on every machine and for ever.

Two kinds. Over the whole set: needs random access. In windows: the files are visited in a shuffled order, each read
from its start to its end, and the rows are shuffled within windows of the sequence that this makes; so a stream that
is read once can have it too. The windows of an epoch grow from :data:`FIRST_WINDOW` rows to the configured size, so
that training need not wait for a whole window.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
#: rows of an epoch's first window; each further one is twice as large, up to the configured size
FIRST_WINDOW = 64
#: a row's number within its file takes this many bits of its hash key; the file's number has the rest
_ROW_BITS = 40


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(n)``, int64 [n]; other seeds and other epochs give unrelated ones.

    Source of the hash: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. It is a bijection
    on 64 bits, so no two indices ever tie.
    """
    keys = _hash(np.arange(n, dtype=np.uint64), seed, epoch)
    return np.argsort(keys).astype(np.int64)


def row_keys(file: np.ndarray | int, row: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """uint64 [n]: by which rows (``row[i]`` of file ``file[i]``) are sorted within a window; no two tie."""
    identity = (np.asarray(file, np.uint64) << np.uint64(_ROW_BITS)) | np.asarray(row, np.uint64)
    return _hash(identity, seed, epoch)


def window_bounds(rows: int, window: int) -> np.ndarray:
    """int64 [w+1]: where the windows of a sequence of ``rows`` rows begin, and the end of the last."""
    bounds, size = [0], min(FIRST_WINDOW, window)
    while bounds[-1] < rows:
        bounds.append(min(rows, bounds[-1] + size))
        size = min(window, 2 * size)
    return np.array(bounds, np.int64)


def window_size(number: int, window: int) -> int:
    """Rows of window ``number`` of an epoch, counting from 0; the last one of an epoch may be shorter."""
    return min(window, FIRST_WINDOW << min(number, 62)) if window > FIRST_WINDOW else window


def windowed_order(
    file: np.ndarray, row: np.ndarray, file_rows: np.ndarray, window: int, seed: int, epoch: int
) -> np.ndarray:
    """int64 [n]: the order of units in windows of rows; units of one row keep theirs.

    Args:
        file, row: int64 [n], the row that each unit was made from.
        file_rows: int64 [F], rows read from each file, refused ones among them: they count for the windows, so that a
            stream that learns of them only while reading has the same ones.
    """
    files = epoch_permutation(len(file_rows), seed, epoch)
    starts = np.zeros(len(file_rows), np.int64)
    starts[files] = np.cumsum(file_rows[files]) - file_rows[files]
    place = starts[file] + row
    windows = np.searchsorted(window_bounds(int(file_rows.sum()), window), place, side="right")
    return np.lexsort((np.arange(len(file)), row_keys(file, row, seed, epoch), windows)).astype(np.int64)


def source_seed(seed: int, name: str) -> int:
    """The seed of one source's order in a mixture: sources of equal size must not walk in step."""
    value = seed & _MASK
    for byte in name.encode():
        value = _mix_number(value ^ byte)
    return value


def _hash(values: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    key = _mix_number(_mix_number(seed & _MASK) ^ ((epoch * _GOLDEN) & _MASK))
    with np.errstate(over="ignore"):
        return _mix((values + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key))


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_number(value: int) -> int:
    with np.errstate(over="ignore"):
        return int(_mix(np.array([(value + _GOLDEN) & _MASK], dtype=np.uint64))[0])
