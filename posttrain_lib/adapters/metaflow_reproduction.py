"""The card of a reproduction: the verdict, every step beside the recorded one, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaflow.cards import Markdown, Table

from posttrain_lib.adapters.metaflow_parts import FAILED, PASSED, block, escaped, text

_HEADERS = ["step", "verdict", "results", "largest difference of a loss", "what differs of what went in", "then", "now"]


def fill_reproduction(card: Any, report: Mapping[str, Any]) -> None:
    """Draw it into Metaflow's ``card``. ``report``: as :func:`steps.reproduce.report` makes it."""
    colour = PASSED if report["reproduced"] else FAILED
    card.append(Markdown(f"# {escaped(report['origin'])}, done again"))
    card.append(block(f"<b style='color:{colour}'>{escaped(report['verdict'])}</b>"))
    card.append(
        Table([[text(name), text(value)] for name, value in report["facts"].items()], headers=["what", "which"])
    )
    card.append(Table([_row(step) for step in report["steps"]], headers=_HEADERS))


def _row(step: Mapping[str, Any]) -> list[Any]:
    then, now = step["seconds"]
    largest = step["largest"]
    return [
        text(step["name"]),
        text(step["verdict"]),
        text(step["what"]),
        text("" if largest is None else f"{largest:.3g}"),
        text("\n".join(step["causes"]), limit=2000),
        text(_seconds(then)),
        text(_seconds(now)),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
