"""Why a row is not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class RefusedRow(Exception):
    """A row that cannot be used. ``reason`` is a stable code for counting, ``detail`` says it for a person.

    ``tokens`` is how many it has; 0 where it was refused before they were made.
    """

    def __init__(self, reason: str, detail: str, tokens: int = 0) -> None:
        self.reason = reason
        self.detail = detail
        self.tokens = tokens
        super().__init__(f"{reason}: {detail}")


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words; in Python's where it comes from Parquet or Arrow, and JSON has none."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text that holds JSON" if value.lstrip().startswith(("[", "{")) else "a text"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}" if isinstance(value, bytes) or not isinstance(value, Sequence) else "a list"
