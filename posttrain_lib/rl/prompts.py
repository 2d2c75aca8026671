"""The prompts of a run, in an order that is a function of the seed alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.errors import DataError


@dataclass(frozen=True)
class RolloutPrompt:
    """One prompt as prepared: its tokens, and what graders and environments want of its row."""

    token_ids: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]
    answer: str | None
    source: str
    row_id: str
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """'source: row id', for messages."""
        return f"{self.source}: {self.row_id}"


def iter_prompts(path: Path) -> Iterator[RolloutPrompt]:
    """The prompts of a file that step ``prepare_data`` wrote, in its order, read one by one."""
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            yield _prompt(json.loads(line))


def read_prompts(path: Path) -> list[RolloutPrompt]:
    """As :func:`iter_prompts`, all of them.

    Raises:
        DataError: there is none.
    """
    prompts = list(iter_prompts(path))
    if not prompts:
        raise DataError(
            "there are no prompts", where=path, fix="give rows with a prompt (data.sources.format: prompts)"
        )
    return prompts


def _prompt(row: Mapping[str, Any]) -> RolloutPrompt:
    return RolloutPrompt(
        token_ids=tuple(row["prompt_ids"]),
        messages=tuple(row["messages"]),
        answer=row["answer"],
        source=row["source"],
        row_id=row["row_id"],
        tools=tuple(row.get("tools", ())),
        extra=row.get("extra", {}),
    )


def fitting(prompts: Sequence[RolloutPrompt], most_tokens: int) -> tuple[list[RolloutPrompt], list[RolloutPrompt]]:
    """(those of at most so many tokens, the others)."""
    short = [prompt for prompt in prompts if len(prompt.token_ids) <= most_tokens]
    return short, [prompt for prompt in prompts if len(prompt.token_ids) > most_tokens]


class PromptOrder:
    """Which prompt a visit asks: pass after pass over all, each in an order of its own.

    Visit v is the v-th prompt that a run asks, from 0. The same (prompts, seed) give the same order, at any time.
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def prompt_of(self, visit: int) -> int:
        """Number of the prompt."""
        epoch, place = divmod(visit, self.prompts)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.prompts)
        return int(self._order[place])
