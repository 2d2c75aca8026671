"""Before and after training, side by side: every metric with its interval, and their difference with a paired one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain_lib.evaluation.bootstrap import Estimate, Scores, difference, estimate

#: the group that has every example
ALL = "all"


def compare(task: str, before: Mapping[str, Scores], after: Mapping[str, Scores], seed: int) -> list[dict[str, Any]]:
    """Rows of plain values for each metric of a task, over all examples and per group where there are several:

    ``task``, ``metric``, ``group`` ("all" or a source), ``better`` ("higher" or "lower"), ``unit`` ("share", "nats" or
    ""), ``before``, ``after`` and ``difference`` (each ``{mean, low, high, examples}`` or None), ``baseline``
    ([name, value] or None), ``verdict`` ("better", "worse", "unclear" where the difference's interval holds 0, "" where
    nothing is compared).
    """
    rows = []
    for metric, later in after.items():
        for group, own in _with_groups(later):
            earlier = before.get(metric)
            if earlier is not None and group != ALL:
                earlier = earlier.of_group(group)
            change = None if earlier is None else difference(earlier, own, seed)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "group": group,
                    "better": own.better,
                    "unit": own.unit,
                    "before": None if earlier is None else _plain(estimate(earlier, seed)),
                    "after": _plain(estimate(own, seed)),
                    "difference": _plain(change),
                    "verdict": _verdict(change, own.better),
                    "baseline": None if own.baseline is None else list(own.baseline),
                }
            )
    return rows


def figure_rows(before: Mapping[str, float], after: Mapping[str, float], examples: int) -> list[dict[str, Any]]:
    """Rows as :func:`compare`'s of a loss's own figures. They are sums over batches, so they have no interval, and
    whether more is better is the loss's matter."""
    return [point_row(name, before.get(name), after.get(name), examples) for name in {**before, **after}]


def point_row(
    metric: str, before: float | None, after: float | None, examples: int, better: str | None = None
) -> dict[str, Any]:
    """A row as :func:`compare`'s of the task "held_out", of values without intervals, and so without a verdict."""

    def point(value: float | None) -> dict[str, Any] | None:
        return None if value is None else _plain(Estimate(value, None, None, examples))

    return {
        "task": "held_out",
        "metric": metric,
        "group": ALL,
        "better": better,
        "unit": "",
        "before": point(before),
        "after": point(after),
        "difference": None if before is None or after is None else point(after - before),
        "verdict": "",
        "baseline": None,
    }


def shown(value: Mapping[str, Any] | None, sign: str = "") -> str:
    """An estimate of a row in words: ``0.5 [0.4, 0.6]``; empty for None. ``sign="+"`` for a difference."""
    if value is None:
        return ""
    interval = "" if value["low"] is None else f" [{value['low']:{sign}.4g}, {value['high']:{sign}.4g}]"
    return f"{value['mean']:{sign}.4g}{interval}"


def _verdict(change: Estimate | None, better: str) -> str:
    if change is None:
        return ""
    if change.low is None or change.high is None or not (change.low > 0 or change.high < 0):
        return "unclear"  # also where a score is no number
    return "better" if (change.mean > 0) == (better == "higher") else "worse"


def _with_groups(scores: Scores) -> Iterator[tuple[str, Scores]]:
    yield ALL, scores
    names = dict.fromkeys(scores.groups or ())
    if len(names) > 1:
        yield from ((name, scores.of_group(name)) for name in names)


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else dataclasses.asdict(found)
