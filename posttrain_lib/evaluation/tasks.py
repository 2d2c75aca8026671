"""Answer checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def exact_match(texts: Sequence[str], answers: Sequence[str]) -> float:
    """Share of texts that equal their answer, outer white space aside."""
    hits = sum(text.strip() == answer.strip() for text, answer in zip(texts, answers, strict=True))
    return hits / max(1, len(answers))


def majority_baseline(answers: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer, and the exact match of always giving it."""
    (answer, count), *_ = Counter(answer.strip() for answer in answers).most_common(1) or [("", 0)]
    return answer, count / max(1, len(answers))
