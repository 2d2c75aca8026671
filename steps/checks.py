"""How steps show a check on the terminal."""

from __future__ import annotations

from posttrain_lib.schema.manifests import Check


def outcome(check: Check, *, reason: bool = False) -> str:
    """``passed name (value, limit limit)``; with ``reason``, what was measured stands behind a semicolon."""
    value = f"{check.value:.3g}" if isinstance(check.value, float) else str(check.value)
    limit = f"{check.limit:.3g}" if isinstance(check.limit, float) else str(check.limit)
    said = f"; {check.reason}" if reason and check.reason else ""
    return f"{'passed' if check.passed else 'FAILED'} {check.name} ({value}, limit {limit}{said})"
