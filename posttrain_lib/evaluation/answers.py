"""Answers in texts: how one is found, when two are the same, and who says that a completion is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol

from posttrain_lib.registry import resolve

#: commas within are of thousands, a list has others; the minus of 10-5 is no sign, and may be typeset (U+2212)
_NUMBER = re.compile(
    r"(?:(?<![\d)])[-\u2212])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\d))?"
)


class Extract(Protocol):
    """From a text to the answer in it; None where it has none."""

    def __call__(self, text: str) -> str | None:
        """The answer, in a form in which equal answers are equal texts."""
        ...


class Verifier(Protocol):
    """Whether a completion answers a row: a bool, or a share in [0, 1]."""

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """``row`` has the prompt's ``answer``, its ``messages``, and the other fields of its row in ``extra``."""
        ...


#: how an answer is found in a text
EXTRACTORS: dict[str, str] = {
    "whole": "posttrain_lib.evaluation.answers:whole",
    "gsm8k": "posttrain_lib.evaluation.answers:behind_four_hashes",
    "last_number": "posttrain_lib.evaluation.answers:last_number",
}


def extractor(name: str, where: str = "extract") -> Extract:
    """The extractor called ``name``, or a user's ``module:attribute``; ConfigError otherwise."""
    found: Extract = resolve(name, EXTRACTORS, what="way to find an answer", where=where)
    return found


def whole(text: str) -> str | None:
    """The text without outer white space."""
    return text.strip()


def behind_four_hashes(text: str) -> str | None:
    """The number behind the last ``####``, as GSM8K's answers end (Cobbe et al. 2021)."""
    _, marker, answer = text.rpartition("####")
    found = _NUMBER.search(answer) if marker else None
    return _plain_number(found.group()) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text, for models that were not taught where to put it."""
    found = _NUMBER.findall(text)
    return _plain_number(found[-1]) if found else None


def _plain_number(number: str) -> str:
    """Without thousands' commas, currency, an exponent and zeros that change nothing: ``$1,250.00`` is ``1250``."""
    plain = number.replace(",", "").replace("$", "").replace("\u2212", "-")
    plain = format(Decimal(plain), "f") if "e" in plain.lower() else plain
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    digits = digits.lstrip("0")
    digits = f"0{digits}" if not digits or digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


def matches(text: str, answer: str, extract: Extract = whole) -> bool:
    """Whether the same answer is found in both; a text without one matches nothing."""
    found = extract(text)
    return found is not None and found == extract(answer)


def exact_match(texts: Sequence[str], answers: Sequence[str]) -> float:
    """Share of texts that equal their answer, outer white space aside."""
    hits = sum(matches(text, answer) for text, answer in zip(texts, answers, strict=True))
    return hits / max(1, len(answers))


def majority_baseline(answers: Sequence[str], extract: Extract = whole) -> tuple[str, float]:
    """The most frequent answer, and the exact match of always giving it."""
    found = Counter(one for answer in answers if (one := extract(answer)) is not None)
    (answer, count), *_ = found.most_common(1) or [("", 0)]
    return answer, count / max(1, len(answers))
