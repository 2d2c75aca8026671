"""A reward model's reliability diagram (Guo et al. 2017, figure 1), for a Metaflow card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.adapters.metaflow_comparison import AFTER, BEFORE
from posttrain_lib.adapters.metaflow_parts import SCHEMA


def reliability_chart(calibration: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A Vega-Lite chart of what ``evaluation.calibration.calibration_of`` gave of each model: the share of answers that
    won over the probability that the scores gave them, a point for each bin that has any. On the diagonal, scores mean
    what they say; below it, for probabilities above one half, they promise too much."""
    points = [
        {"model": model, **one}
        for model, found in calibration.items()
        for one in found["bins"]
        if one["predicted"] is not None
    ]
    errors = ", ".join(f"{model} {found['calibration_error']:.3f}" for model, found in calibration.items())
    unit = {"type": "quantitative", "scale": {"domain": [0, 1]}}
    across = {
        "x": {"field": "predicted", "title": "probability of winning, from the scores", **unit},
        "y": {"field": "observed", "title": "share that won", **unit},
    }
    colour = {
        "field": "model",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["before", "after"], "range": [BEFORE, AFTER]},
    }
    ideal = [{"predicted": 0, "observed": 0}, {"predicted": 1, "observed": 1}]
    size = {"field": "count", "type": "quantitative", "title": "pairs", "scale": {"range": [20, 300]}}
    return {
        "$schema": SCHEMA,
        "title": f"Reliability on held-out pairs, in both orders; expected calibration error: {errors}",
        "width": "container",
        "height": 300,
        "data": {"values": points},
        "layer": [
            {
                "data": {"values": ideal},
                "mark": {"type": "line", "strokeDash": [4, 4], "color": "#999"},
                "encoding": across,
            },
            {"mark": {"type": "line", "strokeWidth": 1}, "encoding": {**across, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "tooltip": {"content": "data"}},
                "encoding": {**across, "color": colour, "size": size},
            },
        ],
    }
