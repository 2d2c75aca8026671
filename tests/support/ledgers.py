"""What a ledger's log tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def trained_visits(lines: Iterable[dict[str, Any]]) -> list[int]:
    """Visits that were trained, in order."""
    return [int(visit[0]) for line in lines for visit in line["trained"]]
