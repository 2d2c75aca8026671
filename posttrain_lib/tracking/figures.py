"""A report as flat figures, under the names that every host shows them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.schema.reports import StepReport


def figures(report: StepReport) -> dict[str, float]:
    """``loss/``, ``optim/``, ``perf/``, ``memory/`` and ``data/`` figures of a step, and the loss's own under its names
    (held out: below ``held_out/``); only those that there are.

    No name begins with another and a slash: some hosts make folders of them. Where the time went is of the step
    ``perf/seconds_of_step``, on CUDA the one before.
    """
    found: dict[str, float | None] = {"data/tokens_seen": report.tokens_seen, "memory/peak_gib": report.peak_memory_gib}
    found |= {f"loss/held_out/{_part(name)}": value for name, value in (report.held_out or {}).items()}
    # of rollouts "reward" is one figure and "reward/exact" another
    found |= {f"held_out/{_part(name)}": value for name, value in report.held_out_figures.items()}
    if report.step > 0:
        found |= report.figures
        found |= {
            "loss/train": report.loss,
            "optim/lr": report.lr,
            "optim/grad_norm": report.grad_norm,
            "optim/incidents": report.incidents,
            "perf/step_seconds": report.step_seconds,
            "perf/tokens_per_second": report.tokens_per_second,
            "perf/trained_tokens_per_second": report.trained_tokens_per_second,
            "perf/model_tflops": report.model_flops / max(1e-9, report.step_seconds) / 1e12,
            "perf/mfu": report.mfu,
            "perf/mfu_measured": report.mfu_measured,
            "perf/hfu": report.hfu,
            "data/fill": report.fill,
            "data/real_tokens": report.real_tokens,
            "data/trained_tokens": report.trained_tokens,
        }
        found |= {f"loss/source/{_part(name)}": value for name, value in report.source_loss.items()}
        found |= {f"data/tokens/{_part(name)}": value for name, value in report.source_tokens.items()}
        found |= {f"data/rows/{name}": value for name, value in report.rows.items()}
        found |= {f"memory/{kind}_gib": value for kind, value in report.memory_gib.items()}
        if report.seconds:
            found |= {f"perf/seconds/{kind}": value for kind, value in report.seconds.items()}
            found["perf/seconds_of_step"] = report.seconds_of_step
    return {name: float(value) for name, value in found.items() if value is not None}


def _part(name: str) -> str:
    """A name within a figure's."""
    return name.replace("/", "_")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as ``a.b.c`` -> value, for hosts that take flat parameters; lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
