"""Reward ``exact``: the answer is the row's, letter by letter."""

from __future__ import annotations

from posttrain_lib.evaluation.answers import extractor
from posttrain_lib.rl.rewards.base import Cheap, Verdict, expected_of
from posttrain_lib.schema.rollouts import Answer


class Exact(Cheap):
    """1 where the same answer is found in the completion and in the row's answer, else 0.

    Args:
        extract: how it is found, as ``evaluation.answers`` has it: whole, gsm8k, last_number, or ``module:attribute``.
        ignore_case: whether upper and lower case are the same.
    """

    needs_answer = True

    def __init__(self, extract: str = "whole", ignore_case: bool = False) -> None:
        self._extract, self._ignore_case = extractor(extract, "rewards: extract"), ignore_case

    def __call__(self, answer: Answer) -> Verdict:
        """DataError where the row has no answer."""
        found, wanted = self._read(answer.text), self._read(expected_of(answer))
        right = found is not None and found == wanted
        return Verdict(float(right), right)

    def _read(self, text: str) -> str | None:
        found = self._extract(text)
        if found is None:
            return None
        plain = " ".join(found.split())
        return plain.casefold() if self._ignore_case else plain
