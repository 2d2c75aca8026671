"""The comparison in the report card."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metaflow.cards import Markdown, Table, VegaChart

from posttrain_lib.adapters.metaflow_comparison import comparison_charts, comparison_parts, comparison_table
from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.comparison import compare, figure_rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    losses, groups = random.normal(3, 0.5, 40), ("chat",) * 20 + ("<tools>",) * 20
    before = {"loss": Scores(losses, groups=groups, better="lower", unit="nats")}
    after = {"loss": Scores(losses - 1 + random.normal(0, 0.1, 40), groups=groups, better="lower", unit="nats")}
    wins = {"win_rate": Scores(random.integers(0, 3, 40) / 2, unit="share", baseline=("no preference", 0.5))}
    shares = {"accuracy": Scores(np.array([0.0, 1.0]), unit="share")}
    return [
        *compare("held_out", before, after, 0), *figure_rows({"rewards/margin": 0.0}, {"rewards/margin": 1.25}, 40),
        *compare("choices", shares, shares, 0), *compare("judged", {}, wins, 0),
    ]  # fmt: skip


def shown(cell: Any) -> str:
    return cell._text if isinstance(cell, Markdown) else cell


def test_the_table_has_a_row_for_each_metric_and_group(rows: list[dict[str, Any]]) -> None:
    table = comparison_table(rows)
    cells = [[shown(cell) for cell in row] for row in table._data]
    assert {len(row) for row in cells} == {len(table._headers)} and len(cells) == len(rows) == 6
    overall = rows[0]["difference"]
    assert f"{overall['mean']:+.4g} [{overall['low']:+.4g}, {overall['high']:+.4g}]" in cells[0][6]
    assert "better" in cells[0][7] and cells[0][3] == "40" and cells[1][3] == "20"
    assert "&lt;tools&gt;" in cells[2][2]
    assert "rewards/margin" in cells[3][1] and "+1.25<" in cells[3][6] and cells[3][7] == ""
    assert "unclear" in cells[4][7]
    assert "0.5 (no preference)" in cells[5][8] and "<span" in cells[5][4] and ">" in cells[5][4]


def test_shares_are_in_one_chart_and_everything_else_has_its_own(rows: list[dict[str, Any]]) -> None:
    charts = comparison_charts(rows)
    assert list(charts) == ["held_out: loss (nats)", "held_out: rewards/margin", "Shares"]
    shares = charts["Shares"]
    assert [(point["of"], point["model"]) for point in shares["data"]["values"]] == [
        ("choices: accuracy", "before"), ("choices: accuracy", "after"), ("judged: win_rate", "after"),
    ]  # fmt: skip
    intervals, points = shares["layer"]
    assert intervals["mark"]["type"] == "rule" and points["mark"]["type"] == "point"
    assert points["encoding"]["x"]["scale"] == {"domain": [0, 1]}
    assert intervals["encoding"]["x"]["field"] == "low" and intervals["encoding"]["x2"]["field"] == "high"
    losses = charts["held_out: loss (nats)"]["data"]["values"]
    assert [point["of"] for point in losses] == ["all", "all", "chat", "chat", "<tools>", "<tools>"]
    assert losses[0]["mean"] == rows[0]["before"]["mean"]


def test_a_run_without_a_comparison_has_no_part_of_it(rows: list[dict[str, Any]]) -> None:
    assert comparison_parts([]) == []
    parts = comparison_parts(rows)
    assert isinstance(parts[0], Markdown) and sum(isinstance(part, Table) for part in parts) == 1
    assert sum(isinstance(part, VegaChart) for part in parts) == 3
