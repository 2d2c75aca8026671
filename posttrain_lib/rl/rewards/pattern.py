"""Rewards ``regex`` and ``format``: what a completion looks like, whatever it says."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Sequence
from typing import Literal

from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.rewards.base import Verdict, expected_of
from posttrain_lib.schema.rollouts import Answer

_MATCHERS = {"search": re.Pattern.search, "match": re.Pattern.match, "fullmatch": re.Pattern.fullmatch}


class Regex:
    """1 where the pattern is found, else 0.

    With a group called ``answer`` in the pattern, what the last match has there must be the row's answer, outer white
    space aside; it then says whether the completion is right.

    Args:
        pattern: of Python's ``re``; ``.`` takes line breaks, too.
        how: anywhere (search), at the start (match), or the whole (fullmatch).

    Raises:
        ConfigError: the pattern is none.
    """

    def __init__(self, pattern: str, how: Literal["search", "match", "fullmatch"] = "search") -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(
                "the pattern cannot be read", where="rewards: pattern", got=pattern, fix=str(error)
            ) from error
        if how not in _MATCHERS:
            raise ConfigError("unknown way to match", where="rewards: how", got=how, expected=", ".join(_MATCHERS))
        self._how = how

    @property
    def needs_answer(self) -> bool:
        """Whether it compares with the rows' answers."""
        return "answer" in self._pattern.groupindex

    def __call__(self, answer: Answer) -> Verdict:
        """DataError where the pattern has an ``answer`` and the row has none."""
        if not self.needs_answer:
            return Verdict(float(_MATCHERS[self._how](self._pattern, answer.text) is not None))
        expected = expected_of(answer).strip()
        if self._how == "search":
            found = next(iter(deque(self._pattern.finditer(answer.text), maxlen=1)), None)
        else:
            found = _MATCHERS[self._how](self._pattern, answer.text)
        right = found is not None and (found["answer"] or "").strip() == expected
        return Verdict(float(right), right)


class Format:
    """The share of the demands that a completion fulfils.

    Args:
        tags: each stands once as ``<tag>...</tag>``, in this order, none within another.
        sections: lines that begin so, in this order, one for each.
        alone: whether nothing but white space may stand outside the tags.
        finished: whether the completion must have come to its end.

    Raises:
        ConfigError: nothing is demanded.
    """

    def __init__(
        self,
        tags: Sequence[str] = (),
        sections: Sequence[str] = (),
        alone: bool = False,
        finished: bool = False,
    ) -> None:
        if not tags and not sections and not finished:
            raise ConfigError("a format that demands nothing", where="rewards: format", expected="tags or sections")
        if alone and not tags:
            raise ConfigError("nothing may stand outside the tags, but there are none", where="rewards: alone")
        self._tags, self._sections, self._alone, self._finished = tuple(tags), tuple(sections), alone, finished

    def __call__(self, answer: Answer) -> float:
        """Demands that are fulfilled over all demands; that of order is one for the tags and one for the sections."""
        demands: list[bool] = []
        if self._tags:
            demands += self._tag_demands(answer.text)
        if self._sections:
            lines = [line.lstrip() for line in answer.text.splitlines()]
            demands += [any(line.startswith(one) for line in lines) for one in self._sections]
            rest = iter(lines)  # of which each section takes its line and those before: none counts for two
            demands.append(all(any(line.startswith(one) for line in rest) for one in self._sections))
        if self._finished:
            demands.append(answer.finished)
        return sum(demands) / len(demands)

    def _tag_demands(self, text: str) -> list[bool]:
        spans: list[tuple[int, int]] = []
        found: list[bool] = []
        for tag in self._tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            first, last = text.find(opening), text.find(closing)
            once = text.count(opening) == 1 == text.count(closing) and first < last
            found.append(once)
            spans.append((first, last + len(closing)))
        ordered = all(found) and all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        demands = [*found, ordered]
        if self._alone:
            borders = [0, *(place for span in spans for place in span), len(text)]
            outside = [text[begin:end] for begin, end in zip(borders[::2], borders[1::2], strict=True)]
            demands.append(ordered and not any(part.strip() for part in outside))
        return demands
