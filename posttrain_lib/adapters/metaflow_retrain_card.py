"""The card of a scheduled retrain: the decision, its gates, the rows, and every decision about the model so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaflow.cards import Markdown, Table

from posttrain_lib.adapters.metaflow_card import checks_table, show
from posttrain_lib.adapters.metaflow_comparison import comparison_parts
from posttrain_lib.adapters.metaflow_lineage import lineage_parts
from posttrain_lib.adapters.metaflow_parts import FAILED, PASSED, block, text
from posttrain_lib.lineage.graph import Graph
from posttrain_lib.lineage.pointer import Entry, TakenRows
from posttrain_lib.schema.manifests import Check, StepManifest


def fill_retrain(
    card: Any,
    said: str,
    rows: TakenRows,
    remarks: Sequence[str],
    decision: Entry | None,
    history: Sequence[Entry],
    manifests: Mapping[str, Mapping[str, Any]],
    lineage: Graph,
) -> None:
    """Draw the whole report into Metaflow's ``card``. ``manifests`` are in plain form; none where nothing was new."""
    made = {name: StepManifest.from_dict(dict(raw)) for name, raw in manifests.items()}
    card.append(Markdown(f"# Retrain of models/{rows.model}"))
    card.append(text(said))
    if decision is not None and decision.gates:
        card.append(Markdown("## Gates"))
        card.append(Table([_gate(gate) for gate in decision.gates], headers=["gate", "result", "value", "stated"]))
    if "evaluate" in made:
        card.append(Markdown("## The current version (before) and the candidate (after)"))
        for part in comparison_parts(made["evaluate"].metrics.get("comparison", [])):
            card.append(part)
    card.append(Markdown("## Rows"))
    taken = [[text(file.path), f"{file.size - file.first_byte:,}", file.digest[:12]] for file in rows.files]
    card.append(Table(taken, headers=["file that is new", "bytes", "digest"]) if taken else text("None that is new."))
    for remark in remarks:
        card.append(text(remark))
    _history(card, history)
    if made:
        checks = [(name, check) for name, manifest in made.items() for check in manifest.checks]
        card.append(Markdown("## Verification"))
        card.append(checks_table(checks) if checks else text("No step with checks was reached."))
        for part in lineage_parts(lineage):
            card.append(part)


def fill_audit(card: Any, name: str, checks: Sequence[Check], history: Sequence[Entry]) -> None:
    """What an audit proved and what not, and every decision about the model."""
    failed = sum(not check.passed for check in checks)
    card.append(
        Markdown(f"# Audit of models/{name}: {f'{failed} of {len(checks)} proofs failed' if failed else 'whole'}")
    )
    card.append(checks_table([("audit", check) for check in checks]))
    _history(card, history)


def _history(card: Any, history: Sequence[Entry]) -> None:
    card.append(Markdown("## Every decision about the model"))
    headers = ["", "at (UTC)", "decision", "version", "by", "why", "digest"]
    card.append(Table([_decision(entry) for entry in reversed(history)], headers=headers))


def _gate(gate: Mapping[str, Any]) -> list[Any]:
    colour, word = (PASSED, "holds") if gate["holds"] else (FAILED, "DOES NOT HOLD")
    value = "not measured" if gate["value"] is None else show(gate["value"])
    return [gate["name"], block(f"<b style='color:{colour}'>{word}</b>"), value, f"{gate['sense']} {gate['limit']}"]


def _decision(entry: Entry) -> list[Any]:
    version = str(entry.version) if entry.version == entry.before else f"{entry.before or 'none'} → {entry.version}"
    by = entry.by if entry.run is None else f"{entry.by}, {entry.run}"
    return [str(entry.number), entry.at, entry.action, version, text(by), text(entry.why), entry.digest()[:12]]
