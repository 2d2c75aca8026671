"""Reward ``maths``: the completion's result equals the row's, however either is written.

Numbers are compared as fractions first. What that does not settle, Math-Verify does (Kydlicek, Hugging Face), which
reads LaTeX and plain expressions and compares them with sympy. Its own time limits are off: they would make a wrong
answer of a comparison that takes too long, where the deadline of the grading process makes a counted failure.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from posttrain_lib.errors import DataError
from posttrain_lib.rl.rewards.base import Verdict, expected_of
from posttrain_lib.schema.rollouts import Answer

_HASHES = "####"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
#: white space stands behind the sign, around a stroke and between thousands, nowhere else: 1 2 is no 12
_NUMBER = re.compile(r"[+-]? ?(?:(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?: ?/ ?\d+)?|\d{1,3}(?: \d{3})+(?:\.\d*)?)")
_MIXED = re.compile(r"([+-]? ?)(\d+) (\d+ ?/ ?\d+)")
#: what may stand around a number and changes nothing; per cent, too, as where MATH compares (Hendrycks et al. 2021)
_TRIMMINGS = re.compile(r"\\[$%!,]|[$%]|\.$")
_SPACE = re.compile(r"\\[;: ]")
#: digits of a number that is compared as a fraction; longer ones cost time that grows with their square
_MOST_DIGITS = 1000


class Maths:
    """1 where the result is the row's, else 0.

    The result stands in the last ``\\boxed{}`` or ``\\fbox{}``, else behind the last ``####`` (GSM8K, Cobbe et al.
    2021), else it is what Math-Verify finds: what the text calls its answer, else its last formula or number. The row's
    answer is written in any of these ways, or is the result alone.

    Args:
        marked: whether only a ``\\boxed{}`` or ``####`` counts.
    """

    needs_answer = True

    def __init__(self, marked: bool = False) -> None:
        import math_verify

        # The library warns, once, that its time limits are off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._library, self._marked = math_verify, marked

    def __call__(self, answer: Answer) -> Verdict:
        """DataError where the row has no answer, or one in which no result can be read."""
        expected = expected_of(answer)
        wanted = marked_result(expected) or expected.strip()
        found = marked_result(answer.text)
        if found is None and self._marked:
            return Verdict(0.0, False)
        right = self._equal(answer.text.strip() if found is None else boxed(found), wanted, found)
        return Verdict(float(right), right)

    def _equal(self, text: str, wanted: str, found: str | None) -> bool:
        """``found``: the marked result in ``text``, where there is one."""
        ours, theirs = number_in(text if found is None else found), number_in(wanted)
        if ours is not None and theirs is not None:
            return ours == theirs
        gold = self._library.parse(boxed(wanted), parsing_timeout=None)
        if not gold:
            raise DataError("no result can be read in the row's answer", got=wanted[:200])
        return bool(self._library.verify(gold, self._library.parse(text, parsing_timeout=None), timeout_seconds=None))


def marked_result(text: str) -> str | None:
    """What the last ``\\boxed{}`` holds, else the line behind the last ``####``; None where there is neither."""
    for start in reversed(list(_BOXED.finditer(text))):
        if (inside := _braced(text, start.end())) is not None:
            return inside.strip()
    _, marker, behind = text.rpartition(_HASHES)
    lines = behind.strip().splitlines() if marker else []
    return lines[0].strip() if lines else None


def boxed(result: str) -> str:
    """The result where Math-Verify looks first."""
    return f"\\boxed{{{result}}}"


def number_in(text: str) -> Fraction | None:
    """The number that the text is: ``$1,250.00``, ``-3/4``, ``2 1/2``, ``\\frac12`` not; None where it is another."""
    plain = _TRIMMINGS.sub("", " ".join(_SPACE.sub(" ", text).split()))
    plain = " ".join(plain.split())
    if len(plain) > _MOST_DIGITS:
        return None
    if mixed := _MIXED.fullmatch(plain):
        whole, part = number_in(mixed[1] + mixed[2]), number_in(mixed[1] + mixed[3])
        return None if whole is None or part is None else whole + part
    if not _NUMBER.fullmatch(plain):
        return None
    over, _, under = plain.replace(",", "").replace(" ", "").partition("/")
    return None if under and not int(under) else Fraction(over) / int(under or 1)


def _braced(text: str, begin: int) -> str | None:
    """From ``begin``, just behind an opening brace, to the brace that closes it; None where none does."""
    depth = 1
    for place in range(begin, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[begin:place]
    return None
