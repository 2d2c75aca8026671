"""Why a row is not trained on."""

from __future__ import annotations


class RefusedRow(Exception):
    """A row that cannot be used. ``reason`` is a stable code for counting, ``detail`` says it for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")
