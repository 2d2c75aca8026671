"""The gates of a run: each one holds, fails, or is not demanded."""

from typing import Any

import pytest

from posttrain_lib.config import load_run_config
from posttrain_lib.errors import TrainingError
from steps.pipeline import DEFAULT_CONFIG
from steps.report import check_gates

SUMMARY: dict[str, Any] = {
    "held_out_before": 6.0,
    "held_out_after": 1.5,
    "held_out_ratio": 0.25,
    "exact_match": {"before": 0.0, "after": 0.9, "majority": 0.1, "majority_answer": "red", "prompts": 100},
    "tokens_per_second": 1000.0,
    "fill": 0.99,
    "peak_memory_gib": 1.0,
    "export": "folder",
}


def config(**gates: float) -> dict[str, Any]:
    wanted = {"max_held_out_loss_ratio": None, "min_exact_match": None, "min_exact_match_over_majority": None, **gates}
    overrides = [f"evaluation.gates.{name}={'null' if value is None else value}" for name, value in wanted.items()]
    return load_run_config(DEFAULT_CONFIG, overrides).model_dump(mode="json")


def test_gates_that_hold_print_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    check_gates(config(max_held_out_loss_ratio=0.5, min_exact_match=0.9, min_exact_match_over_majority=0.8), SUMMARY)
    assert "always answering 'red' would give 0.100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gate", "limit", "said"),
    [
        ("max_held_out_loss_ratio", 0.2, "held-out loss ratio"),
        ("min_exact_match", 0.95, "exact match"),
        ("min_exact_match_over_majority", 0.81, "over majority"),
    ],
)
def test_a_gate_that_does_not_hold_stops_the_run(gate: str, limit: float, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        check_gates(config(**{gate: limit}), SUMMARY)


def test_a_gate_on_what_was_not_measured_fails() -> None:
    with pytest.raises(TrainingError, match="not measured"):
        check_gates(config(min_exact_match=0.5), {**SUMMARY, "exact_match": None})


def test_no_gates_demand_nothing() -> None:
    check_gates(config(), {**SUMMARY, "held_out_ratio": 2.0})
