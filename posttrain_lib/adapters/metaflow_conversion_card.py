"""The card of a conversion: what was verified and how near to its limit, and what an agent tried on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaflow.cards import Markdown, Table

from posttrain_lib.adapters.metaflow_lineage import lineage_parts
from posttrain_lib.adapters.metaflow_parts import block, escaped, text
from posttrain_lib.lineage.graph import Graph
from posttrain_lib.schema.manifests import Check, StepManifest


def fill_conversion(
    card: Any, summary: Mapping[str, Any], manifests: Mapping[str, StepManifest], lineage: Graph
) -> None:
    """Draw the whole report into Metaflow's ``card``."""
    verdict = "verified" if summary["passed"] else "not verified"
    card.append(Markdown(f"# {summary['name']}: {verdict}"))
    card.append(Markdown(f"Model: `{summary['model']}`"))
    last = manifests.get("convert_model") or manifests["propose_family"]
    card.append(Markdown("## Checks"))
    headers = ["check", "result", "value", "limit", "what"]
    card.append(Table([_check_row(check) for check in last.checks], headers=headers))
    if "propose_family" in manifests:
        _proposal(card, summary, manifests["propose_family"])
    for part in lineage_parts(lineage):
        card.append(part)


def _check_row(check: Check) -> list[str]:
    return [
        check.name,
        "passed" if check.passed else "FAILED",
        _figure(check.value),
        _figure(check.limit),
        check.reason,
    ]


def _figure(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _proposal(card: Any, summary: Mapping[str, Any], manifest: StepManifest) -> None:
    found = manifest.metrics
    card.append(Markdown(f"## Attempts of the agent `{found['agent']}`"))
    headers = ["attempt", "seconds", "what was changed", "what the gate said"]
    rows = [[str(a["number"]), f"{a['seconds']:.1f}", a["note"], a["summary"]] for a in found["attempts"]]
    card.append(Table(rows, headers=headers))
    if "family" not in summary["outputs"]:
        card.append(text(f"No definition was found: {found['reason']}."))
        return
    path = Path(summary["outputs"]["family"])
    card.append(Markdown(f"## Proposed, for review: `{path}`, its test `{summary['outputs']['test']}`"))
    card.append(block(f"<pre>{escaped(path.read_text(encoding='utf-8'))}</pre>"))
