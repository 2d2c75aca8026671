"""Near-duplicate examples, and held-out examples that training nearly has.

Two examples are alike by the Jaccard similarity of their sets of 5-token shingles (Broder, *On the resemblance and
containment of documents*, 1997). A signature of fixed size estimates it: one permutation hashing (Li, Owen and Zhang,
2012) splits the hashes of an example's shingles into bins and keeps the least of each, empty bins borrow from others
at random (optimal densification, Shrivastava 2017), and 8 bits of each are kept (b-bit minwise hashing, Li and König
2010). Examples of equal bands of lanes (locality-sensitive hashing) are candidates; the estimate over all lanes then
decides. Nothing but signatures and keys is kept: :data:`SIGNATURE_BYTES`, 8 bytes for the row, and the key per example.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.data.key_log import KeyLog
from posttrain_lib.errors import DataError

#: examples of at least this estimated Jaccard similarity are near-duplicates
THRESHOLD = 0.8
SHINGLE_TOKENS = 5
#: the standard error of an estimate is about sqrt(J (1 - J) / LANES): 0.035 at the threshold
LANES = 128
#: lanes of a band: a pair at the threshold shares one of the 21 bands with probability 0.998, one at 0.3 with 0.015
_BAND_LANES = 6
_BANDS = LANES // _BAND_LANES
_DIGEST_BYTES = 16
SIGNATURE_BYTES = _DIGEST_BYTES + LANES

#: examples of a bucket that each is compared with besides the bucket's first: a bound on the work where thousands of
#: examples share a long system prompt and are therefore half alike
_WINDOW = 8
#: tokens that are hashed at once: the temporary arrays then stay within a core's cache
_BLOCK_TOKENS = 1 << 15
_BLOCK_PAIRS = 1 << 16
_FIRST = 5

_U64 = np.uint64
_BIN_SHIFT = _U64(64 - (LANES.bit_length() - 1))
_EMPTY = _U64(2**64 - 1)
#: lanes agree by chance once in 256 times; so many agree at the threshold
_CHANCE = 1 / 256
_MATCHES_NEEDED = int(np.ceil(LANES * (THRESHOLD * (1 - _CHANCE) + _CHANCE)))


def signatures(examples: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [n, SIGNATURE_BYTES] of n examples (integer ids [S] each): a digest of the ids, then the lanes.

    A pure function of the ids: the same in every process and on every machine, however the examples are grouped. An
    example shorter than a shingle is one shingle.
    """
    made = np.empty((len(examples), SIGNATURE_BYTES), np.uint8)
    for first, end in _blocks([len(ids) for ids in examples]):
        arrays = [np.ascontiguousarray(ids, dtype="<i4") for ids in examples[first:end]]
        digests = b"".join(hashlib.sha256(ids.data).digest()[:_DIGEST_BYTES] for ids in arrays)
        made[first:end, :_DIGEST_BYTES] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST_BYTES)
        made[first:end, _DIGEST_BYTES:] = _lanes(arrays)
    return made


def estimated_jaccard(matches: int) -> float:
    """Jaccard similarity from the number of equal lanes, freed of the matches by chance; in [0, 1]."""
    return max(0.0, (matches / LANES - _CHANCE) / (1 - _CHANCE))


class NearDuplicates:
    """Collects signatures in the order of the examples; :meth:`report` compares them.

    The counts do not depend on the order, but for two cases: in a chain (a like b, b like c, a unlike c) it decides
    how many have an *earlier* relative; and in crowded buckets it decides who is compared.
    """

    def __init__(self) -> None:
        self._keys = KeyLog()
        self._signatures = bytearray()
        self._held_out = bytearray()
        self._rows = array("Q")

    def __len__(self) -> int:
        return len(self._keys)

    def add_signature(self, key: str, made: bytes, *, held_out: bool, row: str | int | None = None) -> None:
        """Take in an example by its signature, one row of :func:`signatures`; ``key`` names it in the report.

        Examples of the same ``row`` are never each other's relatives: the turns of a conversation and the answers of a
        pair begin alike by their making. None: a row of its own.

        Raises:
            DataError: not the size of a signature.
        """
        if len(made) != SIGNATURE_BYTES:
            raise DataError(
                "this is no signature",
                where=key,
                got=f"{len(made)} bytes",
                expected=f"{SIGNATURE_BYTES} bytes",
                fix="pass a row of what near_duplicates.signatures returns",
            )
        # Without a row the example's own number: among so many small numbers a hash of 64 bits falls only by chance.
        self._rows.append(len(self) if row is None else _row_hash(row))
        self._keys.append(key)
        self._held_out.append(held_out)
        self._signatures += made

    def report(self) -> dict[str, Any]:
        """JSON-ready.

        ``near_duplicates`` counts examples with an earlier near-duplicate of another row in the same split, ``exact``
        those of them with an identical one; ``held_out_near_training`` the held-out examples with a near-duplicate in
        training, ``held_out_exactly_in_training`` those with an identical one. ``crowded`` counts examples whose bucket
        was too large for all its pairs to be compared: if it is not 0, the other counts may be too low.
        """
        made = np.frombuffer(self._signatures, np.uint8).reshape(-1, SIGNATURE_BYTES)
        held_out = np.frombuffer(self._held_out, np.uint8).astype(bool)
        found = compare(made, held_out, np.frombuffer(self._rows, np.uint64))
        near, leaked = found.same_split[0] >= _MATCHES_NEEDED, found.training[0] >= _MATCHES_NEEDED
        return {
            "examples": len(self),
            "held_out": int(held_out.sum()),
            "near_duplicates": int(near.sum()),
            "exact": int(found.exact.sum()),
            "share": float(near.sum()) / max(1, len(self)),
            "held_out_near_training": int(leaked.sum()),
            "held_out_exactly_in_training": int(found.exactly_in_training.sum()),
            "crowded": int(found.crowded.sum()),
            "threshold": THRESHOLD,
            "method": f"MinHash: Jaccard of {SHINGLE_TOKENS}-token shingles, estimated over {LANES} lanes; "
            f"{_BANDS} bands of {_BAND_LANES}",
            "first": self._named(near, *found.same_split),
            "first_held_out": self._named(leaked, *found.training),
        }

    def _named(self, chosen: np.ndarray, matches: np.ndarray, partner: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "a": self._keys[int(partner[index])],
                "b": self._keys[index],
                "similarity": round(estimated_jaccard(int(matches[index])), 3),
            }
            for index in np.flatnonzero(chosen)[:_FIRST].tolist()
        ]


@dataclass(frozen=True)
class Found:
    """Per example [n]: (equal lanes, index) of its best earlier relative in its split and of its best one in training.

    Training relatives are those of held-out examples. No relative: 0 equal lanes.
    """

    same_split: tuple[np.ndarray, np.ndarray]
    training: tuple[np.ndarray, np.ndarray]
    exact: np.ndarray
    exactly_in_training: np.ndarray
    crowded: np.ndarray


def compare(made: np.ndarray, held_out: np.ndarray, rows: np.ndarray | None = None) -> Found:
    """Identical examples first, so that a thousand copies are one; then the bands over one example of each content.

    Args:
        made: uint8 [n, SIGNATURE_BYTES].
        held_out: bool [n].
        rows: integers [n], equal for examples of one row, which are not held against each other; None: all differ.
    """
    number = len(made)
    rows = np.arange(number) if rows is None else np.unique(rows, return_inverse=True)[1]
    first, twin, training_twin = _identical(np.ascontiguousarray(made[:, :_DIGEST_BYTES]).view("<u8"), held_out, rows)
    exact = twin >= 0
    kept = np.flatnonzero(first == np.arange(number))
    lanes, held, row = np.ascontiguousarray(made[kept, _DIGEST_BYTES:]), held_out[kept], rows[kept]
    by_place = np.argsort(_place_in_row(row), kind="stable")
    same, training = _Best(len(kept)), _Best(len(kept))
    crowded = np.zeros(len(kept), bool)
    for band in range(_BANDS if len(kept) else 0):
        for one, other in _candidates(lanes, held, row, by_place, band, crowded):
            of_others = row[one] != row[other]
            one, other = one[of_others], other[of_others]
            matches = np.count_nonzero(lanes[one] == lanes[other], axis=1)
            alike = held[one] == held[other]
            same.offer(np.maximum(one, other)[alike], np.minimum(one, other)[alike], matches[alike])
            held_one, trained_one = np.where(held[one], one, other), np.where(held[one], other, one)
            training.offer(held_one[~alike], trained_one[~alike], matches[~alike])
    place = np.searchsorted(kept, first)  # of each example's content among the kept ones
    same_matches, same_partner = same.of(place, kept)
    same_matches[exact], same_partner[exact] = LANES, twin[exact]
    matches, partner = training.of(place, kept)
    exactly = training_twin >= 0
    matches[exactly], partner[exactly] = LANES, training_twin[exactly]
    return Found((same_matches, same_partner), (matches, partner), exact, exactly, crowded[place])


def _identical(
    digests: np.ndarray, held_out: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the same content as each example: the first in its split, the first before it of another row in its split,
    and for a held-out one the first in training. int64 [n] each, -1 for none; the first of all may be itself.

    ``digests`` uint64 [n, 2].
    """
    order = np.lexsort((np.arange(len(digests)), held_out, digests[:, 1], digests[:, 0]))
    digests, held, row = digests[order], held_out[order], rows[order]
    new_content = np.ones(len(order), bool)
    new_content[1:] = (digests[1:] != digests[:-1]).any(axis=1)
    new_run = new_content.copy()
    new_run[1:] |= held[1:] != held[:-1]
    run = np.cumsum(new_run) - 1
    head = np.flatnonzero(new_run)[run]  # places in ``order``
    # Whoever is of the first one's own row is held against the first of another row instead.
    other_row = np.flatnonzero(row != row[head])
    second = np.full(len(order), len(order))
    np.minimum.at(second, run[other_row], other_row)
    second = second[run]
    place = np.arange(len(order))
    before = np.where(row != row[head], head, np.where(second < place, second, -1))
    leader = np.flatnonzero(new_content)[np.cumsum(new_content) - 1]  # training sorts before held-out
    first, twin, trained = (np.empty(len(order), np.int64) for _ in range(3))
    first[order] = order[head]
    twin[order] = np.where(before >= 0, order[before], -1)
    trained[order] = np.where(held & ~held[leader], order[leader], -1)
    return first, twin, trained


def _place_in_row(row: np.ndarray) -> np.ndarray:
    """int64 [n]: how many examples of the same row come before each."""
    order = np.argsort(row, kind="stable")
    new = np.ones(len(order), bool)
    new[1:] = row[order[1:]] != row[order[:-1]]
    number = np.arange(len(order))
    place = np.empty(len(order), np.int64)
    place[order] = number - np.maximum.accumulate(np.where(new, number, 0))
    return place


def _candidates(
    lanes: np.ndarray, held_out: np.ndarray, row: np.ndarray, by_place: np.ndarray, band: int, crowded: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs whose band is equal, in blocks: neighbours within the window, and the first of each split.

    ``crowded`` is set for the members of buckets of which not all pairs come. What fills a large bucket is a prompt
    that many share; near-duplicates among them also share bands in which their own words have a lane, and meet there.
    """
    key = _band_keys(lanes, band)
    order = np.argsort(key, kind="stable")
    repeated = np.zeros(len(order) + 1, bool)
    repeated[1:-1] = key[order[1:]] == key[order[:-1]]
    order = order[repeated[1:] | repeated[:-1]]
    if not len(order):
        return
    new = np.ones(len(order), bool)
    new[1:] = key[order[1:]] != key[order[:-1]]
    bucket, starts = np.cumsum(new) - 1, np.flatnonzero(new)
    for step in range(1, _WINDOW + 1):
        together = np.flatnonzero(bucket[step:] == bucket[:-step])
        yield from _in_blocks(order[together + step], order[together])
    of_several_rows = np.maximum.reduceat(row[order], starts) != np.minimum.reduceat(row[order], starts)
    beyond = ((np.bincount(bucket) > _WINDOW + 1) & of_several_rows)[bucket]
    crowded[order[beyond]] = True
    for split in (False, True):
        head = np.minimum.reduceat(np.where(held_out[order] == split, order, len(lanes)), starts)[bucket]
        wanted = beyond & (head < len(lanes)) & (head != order)
        yield from _in_blocks(order[wanted], head[wanted])


def _row_hash(row: str | int) -> int:
    content = repr(row).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _in_blocks(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for begin in range(0, len(one), _BLOCK_PAIRS):
        yield one[begin : begin + _BLOCK_PAIRS], other[begin : begin + _BLOCK_PAIRS]


def _band_keys(lanes: np.ndarray, band: int) -> np.ndarray:
    """uint64 [n]: the lanes of a band side by side."""
    wide = np.zeros((len(lanes), 8), np.uint8)
    wide[:, :_BAND_LANES] = lanes[:, band * _BAND_LANES : (band + 1) * _BAND_LANES]
    return wide.view("<u8")[:, 0]


class _Best:
    """Per example the relative with the most equal lanes, of equals the earliest."""

    _PARTNER_BITS = 40

    def __init__(self, number: int) -> None:
        self._code = np.zeros(number, np.int64)

    def offer(self, example: np.ndarray, partner: np.ndarray, matches: np.ndarray) -> None:
        """Candidates: int64 [p] each."""
        earliest = (1 << self._PARTNER_BITS) - 1 - partner
        np.maximum.at(self._code, example, (matches.astype(np.int64) << self._PARTNER_BITS) | earliest)

    def of(self, place: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(equal lanes, index of the relative) of the examples at ``place``; 0 lanes where there is none."""
        code = self._code[place]
        matches = code >> self._PARTNER_BITS
        partner = (1 << self._PARTNER_BITS) - 1 - (code & ((1 << self._PARTNER_BITS) - 1))
        partner[matches == 0] = 0
        return matches, kept[partner] if len(kept) else partner


def _blocks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of consecutive examples of about :data:`_BLOCK_TOKENS` tokens together."""
    first = tokens = 0
    for index, length in enumerate(lengths):
        tokens += max(length, SHINGLE_TOKENS)
        if tokens >= _BLOCK_TOKENS:
            yield first, index + 1
            first, tokens = index + 1, 0
    if first < len(lengths):
        yield first, len(lengths)


def _lanes(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [n, LANES] of n examples of int32 ids."""
    hashes, owner = _shingle_hashes(arrays)
    least = np.full(len(arrays) * LANES, _EMPTY)
    np.minimum.at(least, owner * LANES + (hashes >> _BIN_SHIFT).astype(np.int64), hashes)
    empty = np.flatnonzero(least == _EMPTY)
    # An empty bin asks the others, one after the other in an order of its own, for the least that they hold.
    original = least.copy()
    for donors in _DONORS if len(empty) else ():
        answers = original[empty + donors[empty & (LANES - 1)]]
        least[empty] = answers
        empty = empty[answers == _EMPTY]
        if not len(empty):
            break
    # The high bits chose the bin and the least in it; the low ones are free.
    return (least & _U64(0xFF)).astype(np.uint8).reshape(len(arrays), LANES)


def _shingle_hashes(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [shingles], the index of the example that each belongs to int64 [shingles])."""
    lengths = np.array([len(ids) for ids in arrays])
    padded = np.maximum(lengths, SHINGLE_TOKENS)
    if (lengths < SHINGLE_TOKENS).any():
        padding = np.full(SHINGLE_TOKENS, -1, np.int32)  # no token has that id
        arrays = [
            ids if len(ids) >= SHINGLE_TOKENS else np.concatenate([ids, padding])[:SHINGLE_TOKENS] for ids in arrays
        ]
    tokens = np.concatenate(arrays).astype(_U64)
    tokens *= _U64(0x9E3779B97F4A7C15)
    tokens ^= tokens >> _U64(29)
    # Sums of products over pairs, over fours, over fives: three multiplications a shingle, not five.
    pairs = tokens[:-1] * _U64(0xBF58476D1CE4E5B9)
    pairs += tokens[1:]
    hashes = pairs[:-2] * _U64(0x94D049BB133111EB)
    hashes += pairs[2:]
    hashes = hashes[:-1] * _U64(0xD6E8FEB86659FD93)
    hashes += tokens[4:]
    _mix(hashes)
    owner = np.repeat(np.arange(len(arrays)), padded)
    whole = owner[: len(hashes)] == owner[SHINGLE_TOKENS - 1 :]
    return hashes[whole], owner[: len(hashes)][whole]


def _mix(values: np.ndarray) -> None:
    """Spread every bit of uint64 over all, in place (the finaliser of MurmurHash3, Appleby)."""
    values ^= values >> _U64(33)
    values *= _U64(0xFF51AFD7ED558CCD)
    values ^= values >> _U64(33)
    values *= _U64(0xC4CEB9FE1A85EC53)
    values ^= values >> _U64(33)


def _donor_orders() -> np.ndarray:
    """int64 [LANES, LANES], [t, bin]: how far from a bin the t-th one that it asks lies; every other bin once."""
    values = np.arange(1, LANES * LANES + 1, dtype=_U64)
    _mix(values)
    asked = np.argsort(values.reshape(LANES, LANES), axis=0, kind="stable")
    return asked - np.arange(LANES)


_DONORS = _donor_orders()
