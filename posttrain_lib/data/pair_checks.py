"""Preference pairs that teach nothing or the opposite of each other, and what of training stands in the held-out split.

Per pair, three hashes of 64 bits and the row id are kept. At ten million pairs the odds that any two of the twenty
million answers share a hash by chance are about one in 100,000.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain_lib.data.key_log import KeyLog

#: answers with at least this share of their tokens in common (sizes of the multisets' intersection over union)
NEARLY_IDENTICAL = 0.9
_FIRST = 5

#: finding -> what it means; the order of the report
FINDINGS = {
    "identical": "chosen and rejected are the same",
    "prefix": "chosen or rejected is the beginning of the other: often one that was cut off",
    "nearly_identical": f"chosen and rejected have {NEARLY_IDENTICAL:.0%} of their tokens in common, in whatever order",
    "repeated": "prompt, chosen and rejected were there in an earlier row of the same split",
    "contradicting": "to this prompt, an answer of this row is chosen in one row and rejected in another",
    "chosen_rejected_elsewhere": "a training row's chosen answer is rejected in another row, to whatever prompt",
    "held_out_prompt_in_training": "a held-out row's prompt is one of training",
    "held_out_pair_in_training": "a held-out row's prompt and both answers are those of a training row",
}


@dataclass
class _Lengths:
    """Tokens of the answers of a split."""

    pairs: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0

    def see(self, chosen: int, rejected: int) -> None:
        self.pairs += 1
        self.chosen_tokens += chosen
        self.rejected_tokens += rejected
        self.chosen_longer += chosen > rejected
        self.rejected_longer += rejected > chosen

    def report(self) -> dict[str, Any]:
        pairs = max(1, self.pairs)
        return {
            "pairs": self.pairs,
            "mean_chosen_tokens": self.chosen_tokens / pairs,
            "mean_rejected_tokens": self.rejected_tokens / pairs,
            "chosen_longer": self.chosen_longer / pairs,
            "rejected_longer": self.rejected_longer / pairs,
        }


@dataclass
class _Alone:
    """Rows of a finding that a pair shows by itself."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def see(self, row_id: str) -> None:
        self.rows += 1
        if len(self.first) < _FIRST:
            self.first.append(row_id)


class PairChecks:
    """Collects preference pairs; :meth:`report` says what is wrong with them together.

    Counts do not depend on the order of the pairs; the first row ids do.
    """

    def __init__(self) -> None:
        self._row_ids = KeyLog()
        self._hashes = array("Q")  # prompt, chosen, rejected of each pair
        self._held_out = bytearray()
        self._alone = {name: _Alone() for name in ("identical", "prefix", "nearly_identical")}
        self._lengths = {"training": _Lengths(), "held_out": _Lengths()}

    def __len__(self) -> int:
        return len(self._row_ids)

    def add(
        self,
        row_id: str,
        prompt_ids: np.ndarray,
        chosen_ids: np.ndarray,
        rejected_ids: np.ndarray,
        *,
        held_out: bool,
    ) -> None:
        """Take in a pair: int32 [S] each.

        The answers come without the prompt and without the marker that ends them: with it, no answer would be the
        beginning of another.
        """
        self._row_ids.append(row_id)
        self._held_out.append(held_out)
        self._hashes.extend(_hash(ids) for ids in (prompt_ids, chosen_ids, rejected_ids))
        self._lengths["held_out" if held_out else "training"].see(len(chosen_ids), len(rejected_ids))
        shown = _alike(chosen_ids, rejected_ids)
        if shown:
            self._alone[shown].see(row_id)

    def report(self) -> dict[str, Any]:
        """JSON-ready.

        Per finding of :data:`FINDINGS` its ``rows``, their ``share`` of all pairs and the ``first`` row ids; per split,
        ``lengths`` has the mean tokens and the shares of pairs in which one answer is longer.

        A pair of identical answers is counted as such only: it contradicts no other row.
        """
        found = self._together()
        findings: dict[str, Any] = {}
        for name, meaning in FINDINGS.items():
            if name in self._alone:
                rows, first = self._alone[name].rows, self._alone[name].first
            else:
                rows = int(found[name].sum())
                first = [self._row_ids[index] for index in np.flatnonzero(found[name])[:_FIRST].tolist()]
            findings[name] = {"rows": rows, "share": rows / max(1, len(self)), "meaning": meaning, "first": first}
        return {
            "pairs": len(self),
            "held_out": sum(self._held_out),
            "findings": findings,
            "lengths": {name: lengths.report() for name, lengths in self._lengths.items()},
        }

    def _together(self) -> dict[str, np.ndarray]:
        """Per finding that takes several rows: which rows show it, bool [n]."""
        prompt, chosen, rejected = np.array(self._hashes, dtype=np.uint64).reshape(-1, 3).T
        held_out = np.frombuffer(bytes(self._held_out), np.uint8).astype(bool)
        training, differs = ~held_out, chosen != rejected
        to_chosen, to_rejected = _joined(prompt, chosen), _joined(prompt, rejected)
        pair = _joined(to_chosen, rejected)
        both = np.intersect1d(to_chosen[differs], to_rejected[differs])
        repeated = np.zeros(len(prompt), bool)
        for split in (training, held_out):
            rows = np.flatnonzero(split)
            repeated[rows] = True
            repeated[rows[np.unique(pair[rows], return_index=True)[1]]] = False
        return {
            "repeated": repeated,
            "contradicting": differs & (np.isin(to_chosen, both) | np.isin(to_rejected, both)),
            "chosen_rejected_elsewhere": training & differs & np.isin(chosen, rejected[differs]),
            "held_out_prompt_in_training": held_out & np.isin(prompt, prompt[training]),
            "held_out_pair_in_training": held_out & np.isin(pair, pair[training]),
        }


def _alike(chosen: np.ndarray, rejected: np.ndarray) -> str | None:
    """The first of identical, prefix and nearly_identical that holds. An empty answer is a prefix of every other."""
    shorter, longer = sorted((np.asarray(chosen), np.asarray(rejected)), key=len)
    if np.array_equal(shorter, longer[: len(shorter)]):
        return "identical" if len(shorter) == len(longer) else "prefix"
    if len(shorter) < NEARLY_IDENTICAL * len(longer):
        return None  # even all of the shorter one in common would not be enough
    tokens, counts = np.unique(shorter, return_counts=True)
    others, numbers = np.unique(longer, return_counts=True)
    _, mine, theirs = np.intersect1d(tokens, others, assume_unique=True, return_indices=True)
    common = int(np.minimum(counts[mine], numbers[theirs]).sum())
    return "nearly_identical" if common >= NEARLY_IDENTICAL * (len(shorter) + len(longer) - common) else None


def _hash(ids: np.ndarray) -> int:
    content = np.ascontiguousarray(ids, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """uint64 [n]: one hash of two; the order matters."""
    joined = one * np.uint64(0x9E3779B97F4A7C15)
    joined ^= joined >> np.uint64(32)
    joined += other
    joined *= np.uint64(0xD6E8FEB86659FD93)
    return joined ^ (joined >> np.uint64(32))
