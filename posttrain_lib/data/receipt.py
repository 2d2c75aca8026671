"""The data receipt: what came in, what was made of it, what was refused and why. Nothing is dropped without a count."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain_lib.data.encoding import EncodedRow, Example, example_digest, prompt_digest
from posttrain_lib.data.near_duplicates import NearDuplicates
from posttrain_lib.data.oddities import Oddities
from posttrain_lib.data.pair_checks import PairChecks
from posttrain_lib.schema.manifests import Check

#: notes that belong on the terminal
_SAID = {
    "duplicate_examples": "duplicate examples",
    "held_out_prompts_also_in_training": "held-out prompts that training answers, not used for evaluation",
    "groups_held_out_against_chance": "group of rows held out where data.held_out.fraction gave none",
    "left_out_nothing_to_train": "rows without a trained turn",
    "left_out_nothing_left": "parts without a trained token left out",
    "left_out_too_long": "examples left out as too long",
    "left_out_duplicate": "duplicate examples left out",
    "truncated_tokens": "tokens cut off",
    "left_out_tokens": "tokens in what was refused or left out",
}
#: counts of a source, in the order of the receipt
_SOURCE_COUNTS = ("rows", "refused", "examples", "held_out", "truncated", "tokens", "trained_tokens", "shared_tokens")


@dataclass
class Receipt:
    """Counts, filled row by row.

    ``sources`` holds per source the counts of :data:`_SOURCE_COUNTS`; tokens are those of training and held-out
    examples together, ``shared_tokens`` those at the start of an example that the one before it has too. ``roles``
    holds (tokens, trained tokens) per source and role. ``notes`` counts what a person should know of and nothing was
    refused for; among them ``read_tokens``, all that rows were encoded to, which are the examples' tokens,
    ``truncated_tokens`` and ``left_out_tokens`` together. ``made_by`` says which tokenizer, template and engine made
    the ids.
    """

    max_refused_fraction: float
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    roles: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first_refused: list[dict[str, str]] = field(default_factory=list)
    oddities: Oddities = field(default_factory=Oddities)
    made_by: dict[str, Any] = field(default_factory=dict)
    _near: NearDuplicates = field(default_factory=NearDuplicates, repr=False)
    _pairs: PairChecks = field(default_factory=PairChecks, repr=False)
    _near_report: dict[str, Any] | None = field(default=None, repr=False)
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

    def is_duplicate(self, *examples: Example) -> bool:
        """Whether examples of the same ids and weights came before, in this order; these then count as seen."""
        digest = b"".join(map(example_digest, examples))
        seen = digest in self._seen
        self._seen.add(digest)
        return seen

    def example(self, source: str, example: Example, *, kind: str, held_out: bool, bos_id: int | None) -> None:
        """An example was written. Those of a row come between its :meth:`row` and the next."""
        counts = self._of(source)
        counts["examples"] += 1
        counts["held_out"] += held_out
        counts["truncated"] += example.truncated
        counts["tokens"] += len(example.ids)
        counts["shared_tokens"] += example.shared
        counts["trained_tokens"] += int(np.count_nonzero(example.weights[1:]))
        roles = self.roles.setdefault(source, defaultdict(lambda: [0, 0]))
        for role, number in example.by_role.items():
            roles[role][0] += number
        for role, number in example.trained_by_role.items():
            roles[role][1] += number
        self.kinds[kind] += 1
        self.lengths[_bin(len(example.ids))] += 1
        self.notes["double_bos"] += bos_id is not None and list(example.ids[:2]) == [bos_id, bos_id]
        self.notes["missing_end"] += not example.closed
        self.notes["resplit_examples"] += example.resplit
        if example.signature:
            # The number of the row: its id cannot be told from the suffixes of its examples with certainty.
            row, key = f"{source}: {counts['rows']}", f"{source}: {example.row_id}"
            self._near.add_signature(key, example.signature, held_out=held_out, row=row)

    def pair(self, row: EncodedRow, markers: frozenset[int]) -> None:
        """A preference pair was written. ``markers`` close an answer and are no part of what it says."""
        start = row.examples[0].prompt_tokens
        answers = []
        for example in row.examples:
            said = ~np.isin(example.ids[start:], list(markers))
            end = start + (len(said) - int(np.argmax(said[::-1])) if said.any() else 0)
            answers.append(example.ids[start:end])
        self._pairs.add(row.row_id, row.examples[0].ids[:start], *answers, held_out=row.held_out)

    def trained_prompts(self, digests: tuple[bytes, ...]) -> None:
        """Prompts whose answers are trained; no held-out prompt may be one."""
        self._train_prompts.update(digests)

    def leaked(self, prompt_ids: np.ndarray) -> bool:
        """Whether this very prompt is answered in training, at whatever turn; ask after the last row."""
        return prompt_digest(prompt_ids) in self._train_prompts

    def total(self, name: str) -> int:
        """A count over all sources."""
        return sum(counts[name] for counts in self.sources.values())

    @property
    def refused_fraction(self) -> float:
        """Refused rows of all rows."""
        return self.total("refused") / max(1, self.total("rows"))

    def near_duplicates(self) -> dict[str, Any]:
        """Near-duplicate examples, and held-out ones that training nearly has; worked out once, after the last row."""
        if self._near_report is None:
            self._near_report = self._near.report()
        return self._near_report

    def checks(self) -> list[Check]:
        """What the step has proved."""
        refused, trained = self.refused_fraction, self.total("trained_tokens")
        doubled, open_ended = self.notes["double_bos"], self.notes["missing_end"]
        limit, reason = self.max_refused_fraction, "without one the model does not learn to stop"
        checks = [
            Check("refused rows", refused <= limit, refused, limit, "data.max_refused_fraction"),
            Check("no double begin-of-sequence", doubled == 0, float(doubled), 0.0, "one is what serving sends"),
            Check("the template ends every answer with a marker", open_ended == 0, float(open_ended), 0.0, reason),
        ]
        lost = self.notes["read_tokens"] - self.total("tokens") - self.notes["truncated_tokens"]
        lost -= self.notes["left_out_tokens"]
        checks.append(Check("no token is lost", lost == 0, float(lost), 0.0, "read = kept + cut off + left out"))
        if set(self.kinds) != {"prompt"}:
            checks.insert(1, Check("trained tokens", trained > 0, float(trained), 1.0, "at least one"))
        return checks

    def summary(self) -> str:
        """One line for the terminal."""
        share = self.total("trained_tokens") / max(1, self.total("tokens"))
        near = self.near_duplicates()
        said = [f"{self.notes[name]:,} {words}" for name, words in _SAID.items() if self.notes[name]]
        if near["near_duplicates"]:
            said.append(f"{near['near_duplicates']:,} near-duplicate examples ({near['share']:.1%})")
        if near["held_out_near_training"]:
            said.append(f"{near['held_out_near_training']:,} held-out examples that training nearly has")
        return (
            f"{self.total('rows'):,} rows, {self.total('refused'):,} refused; {self.total('examples'):,} examples "
            f"({self.total('held_out'):,} held out) of {self.total('tokens'):,} tokens, {share:.0%} trained"
            + "".join(f"; {words}" for words in said)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "sources": {name: {key: counts[key] for key in _SOURCE_COUNTS} for name, counts in self.sources.items()},
            "roles": {
                source: {role: {"tokens": pair[0], "trained": pair[1]} for role, pair in sorted(roles.items())}
                for source, roles in self.roles.items()
            },
            "kinds": dict(sorted(self.kinds.items())),
            "refused": dict(self.refused.most_common()),
            "first_refused": self.first_refused,
            "notes": dict(sorted(self.notes.items())),
            "length_histogram": {_bin_name(low): self.lengths[low] for low in sorted(self.lengths)},
            "near_duplicates": self.near_duplicates(),
            "oddities": self.oddities.report(),
            "pairs": self._pairs.report() if len(self._pairs) else None,
            "made_by": self.made_by,
        }

    def _of(self, source: str) -> Counter[str]:
        return self.sources.setdefault(source, Counter())


def _bin(length: int) -> int:
    """Lower end of the bin: powers of two."""
    return 1 << (length.bit_length() - 1)


def _bin_name(low: int) -> str:
    return str(low) if low == 1 else f"{low}-{2 * low - 1}"
