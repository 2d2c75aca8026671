"""The reliability diagram in the report card."""

from __future__ import annotations

import numpy as np

from posttrain_lib.adapters.metaflow_calibration import reliability_chart
from posttrain_lib.evaluation.calibration import PairScores, calibration_of


def test_the_diagram_has_a_point_for_each_bin_that_has_pairs() -> None:
    def found(*leads: float) -> dict:
        return calibration_of(PairScores(np.array(leads), np.zeros(len(leads)), ("s",) * len(leads)), 0)

    before, after = found(0.1, -0.1), found(3.0, 3.0, -3.0)
    chart = reliability_chart({"before": before, "after": after})
    points = [(one["model"], one["low"], one["count"]) for one in chart["data"]["values"]]
    assert points == [("before", 0.4, 2), ("before", 0.5, 2), ("after", 0.0, 3), ("after", 0.9, 3)]
    diagonal, line, dots = chart["layer"]
    assert [one["observed"] == one["predicted"] for one in diagonal["data"]["values"]] == [True, True]
    assert line["mark"]["type"] == "line" and dots["mark"]["type"] == "point"
    assert dots["encoding"]["x"]["scale"] == dots["encoding"]["y"]["scale"] == {"domain": [0, 1]}
    assert {dots["encoding"][name]["field"] for name in ("x", "y", "size")} == {"predicted", "observed", "count"}
    assert f"before {before['calibration_error']:.3f}, after {after['calibration_error']:.3f}" in chart["title"]
