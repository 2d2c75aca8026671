"""Before and after training as a table and as charts, for a Metaflow card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaflow.cards import Markdown, Table, VegaChart

from posttrain_lib.adapters.metaflow_parts import FAILED, PASSED, SCHEMA, block, text
from posttrain_lib.evaluation.comparison import shown

#: colours of the two models
BEFORE, AFTER = "#9e9e9e", "#1565c0"
_COLOURS = {"better": PASSED, "worse": FAILED}
_HEADERS = ["task", "metric", "of", "examples", "before", "after", "difference", "verdict", "baseline"]
_NOTE = (
    "In brackets: 95% intervals, by resampling examples; that of the difference resamples an example's two scores "
    "together. They tell how much other examples would change a number, not another training run. *unclear*: the "
    "difference's interval holds 0."
)


def comparison_parts(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Components for the rows of ``evaluation.comparison``; none where there are none."""
    if not rows:
        return []
    charts = [VegaChart(spec) for spec in comparison_charts(rows).values()]
    return [Markdown("## Comparison"), Markdown(_NOTE), comparison_table(rows), *charts]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each metric and group."""
    cells = []
    for row in rows:
        examples = (row["after"] or row["before"] or {}).get("examples")
        baseline = "" if row["baseline"] is None else f"{row['baseline'][1]:.4g} ({row['baseline'][0]})"
        cells.append(
            [
                text(row["task"]),
                text(row["metric"]),
                text(row["group"]),
                "" if examples is None else f"{examples:,}",
                text(shown(row["before"])),
                text(shown(row["after"])),
                text(shown(row["difference"], sign="+")),
                _coloured(row["verdict"]),
                text(baseline),
            ]
        )
    return Table(cells, headers=_HEADERS)


def comparison_charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Vega-Lite charts by title: values before and after with their intervals. All shares are in one, from 0 to 1;
    every other metric has one of its own, for it has a scale of its own."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        several = row["unit"] == "share"
        name = f"{row['task']}: {row['metric']}"
        label = (name if row["group"] == "all" else f"{name}, {row['group']}") if several else row["group"]
        points = found.setdefault("Shares" if several else name + f" ({row['unit']})" * bool(row["unit"]), [])
        for model in ("before", "after"):
            if (value := row[model]) is not None:
                points.append({"of": label, "model": model, **value})
    return {title: _chart(title, points, [0, 1] if title == "Shares" else None) for title, points in found.items()}


def _chart(title: str, points: list[dict[str, Any]], domain: list[float] | None) -> dict[str, Any]:
    scale: dict[str, Any] = {"zero": False} if domain is None else {"domain": domain}
    across = {
        "y": {
            "field": "of",
            "type": "nominal",
            "sort": list(dict.fromkeys(point["of"] for point in points)),
            "title": None,
            "axis": {"labelLimit": 320},
        },
        "yOffset": {"field": "model", "type": "nominal", "sort": ["before", "after"]},
        "color": {
            "field": "model",
            "type": "nominal",
            "title": None,
            "scale": {"domain": ["before", "after"], "range": [BEFORE, AFTER]},
        },
    }
    value = {"field": "mean", "type": "quantitative", "title": None, "scale": scale}
    return {
        "$schema": SCHEMA,
        "title": f"{title}, with 95% intervals",
        "width": "container",
        "height": {"step": 14},
        "data": {"values": points},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {**across, "x": {**value, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "tooltip": {"content": "data"}},
                "encoding": {**across, "x": value},
            },
        ],
    }


def _coloured(verdict: str) -> Any:
    if not verdict:
        return ""
    return block(f"<b style='color:{_COLOURS.get(verdict, '#666')}'>{verdict}</b>")
