"""Why a row is not trained on."""

from __future__ import annotations


class RefusedRow(Exception):
    """A row that cannot be used. ``reason`` is a stable code for counting, ``detail`` says it for a person.

    ``tokens`` is how many it has; 0 where it was refused before they were made.
    """

    def __init__(self, reason: str, detail: str, tokens: int = 0) -> None:
        self.reason = reason
        self.detail = detail
        self.tokens = tokens
        super().__init__(f"{reason}: {detail}")
