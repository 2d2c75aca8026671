"""The data receipt: what came in, what was made of it, what was refused and why. Nothing is dropped without a count."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain_lib.data.tokenize import Tokens
from posttrain_lib.schema.manifests import Check

#: notes that belong on the terminal
_SAID = {
    "duplicate_examples": "duplicate examples",
    "held_out_prompts_also_in_training": "held-out prompts that training answers, not used for evaluation",
    "left_out_nothing_to_train": "rows without a trained turn",
}
#: counts of a source, in the order of the receipt
_SOURCE_COUNTS = ("rows", "refused", "examples", "held_out", "truncated", "tokens", "trained_tokens")


@dataclass
class Receipt:
    """Counts, filled row by row.

    ``sources`` holds per source the counts of :data:`_SOURCE_COUNTS`; tokens are those of training and held-out
    examples together. ``roles`` holds (tokens, trained tokens) per source and role. ``notes`` counts what a person
    should know of and nothing was refused for.
    """

    max_refused_fraction: float
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    roles: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first_refused: list[dict[str, str]] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set, repr=False)
    _train_prompts: set[bytes] = field(default_factory=set, repr=False)

    def row(self, source: str) -> None:
        """A row was read."""
        self._of(source)["rows"] += 1

    def refuse(self, source: str, row_id: str, reason: str, detail: str) -> None:
        """A row was refused."""
        self._of(source)["refused"] += 1
        self.refused[reason] += 1
        if len(self.first_refused) < 5:
            self.first_refused.append({"source": source, "row_id": row_id, "reason": reason, "detail": detail})

    def example(self, source: str, tokens: Tokens, *, held_out: bool, truncated: bool) -> None:
        """An example was written."""
        counts = self._of(source)
        counts["examples"] += 1
        counts["held_out"] += held_out
        counts["truncated"] += truncated
        counts["tokens"] += len(tokens.ids)
        counts["trained_tokens"] += int(np.count_nonzero(tokens.weights[1:]))
        roles = self.roles.setdefault(source, defaultdict(lambda: [0, 0]))
        for role, number in tokens.by_role.items():
            roles[role][0] += number
        for role, number in tokens.trained_by_role.items():
            roles[role][1] += number
        self.lengths[_bin(len(tokens.ids))] += 1
        content = _digest(tokens.ids)
        self.notes["duplicate_examples"] += content in self._seen
        self._seen.add(content)

    def trained_prompt(self, prompt_ids: np.ndarray) -> None:
        """A prompt whose answer is trained; no held-out prompt may be one."""
        self._train_prompts.add(_digest(prompt_ids))

    def leaked(self, prompt_ids: np.ndarray) -> bool:
        """Whether this very prompt is answered in training, at whatever turn; ask after the last row."""
        return _digest(prompt_ids) in self._train_prompts

    def total(self, name: str) -> int:
        """A count over all sources."""
        return sum(counts[name] for counts in self.sources.values())

    @property
    def refused_fraction(self) -> float:
        """Refused rows of all rows."""
        return self.total("refused") / max(1, self.total("rows"))

    def checks(self) -> list[Check]:
        """What the step has proved."""
        refused, trained = self.refused_fraction, self.total("trained_tokens")
        doubled, open_ended = self.notes["double_bos"], self.notes["missing_end"]
        limit, reason = self.max_refused_fraction, "without one the model does not learn to stop"
        return [
            Check("refused rows", refused <= limit, refused, limit, "data.max_refused_fraction"),
            Check("trained tokens", trained > 0, float(trained), 1.0, "at least one"),
            Check("no double begin-of-sequence", doubled == 0, float(doubled), 0.0, "one is what serving sends"),
            Check("the template ends every answer with a marker", open_ended == 0, float(open_ended), 0.0, reason),
        ]

    def summary(self) -> str:
        """One line for the terminal."""
        share = self.total("trained_tokens") / max(1, self.total("tokens"))
        return (
            f"{self.total('rows'):,} rows, {self.total('refused'):,} refused; {self.total('examples'):,} examples "
            f"({self.total('held_out'):,} held out) of {self.total('tokens'):,} tokens, {share:.0%} trained"
            + "".join(f"; {self.notes[name]:,} {said}" for name, said in _SAID.items() if self.notes[name])
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "sources": {name: {key: counts[key] for key in _SOURCE_COUNTS} for name, counts in self.sources.items()},
            "roles": {
                source: {role: {"tokens": pair[0], "trained": pair[1]} for role, pair in sorted(roles.items())}
                for source, roles in self.roles.items()
            },
            "refused": dict(self.refused.most_common()),
            "first_refused": self.first_refused,
            "notes": dict(sorted(self.notes.items())),
            "length_histogram": {_bin_name(low): self.lengths[low] for low in sorted(self.lengths)},
        }

    def _of(self, source: str) -> Counter[str]:
        return self.sources.setdefault(source, Counter())


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).digest()[:16]


def _bin(length: int) -> int:
    """Lower end of the bin: powers of two."""
    return 1 << (length.bit_length() - 1)


def _bin_name(low: int) -> str:
    return str(low) if low == 1 else f"{low}-{2 * low - 1}"
