"""What a finished run says of itself: the summary, the gates, and the figures of the report card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.evaluation import MetricGate
from posttrain_lib.errors import TrainingError
from posttrain_lib.schema.manifests import StepManifest
from posttrain_lib.schema.reports import HELD_OUT_LOSS
from steps.recorded import lineage_of

Manifests = Mapping[str, StepManifest]

#: how shares of the peak are called, and their fields: by data sheet, by the product measured, with recomputation
_PEAK_SHARES = {"MFU": "mfu", "MFU of the measured peak": "mfu_measured", "HFU": "hfu"}


def summarise(run_config: dict[str, Any], manifests: Manifests) -> dict[str, Any]:
    """The figures a person asks for first, as plain values (an artifact of the flow's last step)."""
    evaluation, training = manifests["evaluate"].metrics, manifests["train"].metrics
    before, after = evaluation["held_out_before"]["all"], evaluation["held_out_after"]["all"]
    return {
        "name": run_config["name"],
        "backend": run_config["model"]["backend"],
        "model_origin": run_config["model"].get("origin"),
        "steps": training["step"],
        "data_end": training["data_end"],
        "tokens_seen": training["tokens_seen"],
        "held_out_is": evaluation.get("held_out_is", HELD_OUT_LOSS),
        "held_out_before": before,
        "held_out_after": after,
        # Of rollouts it is 0 where nothing was wrong, and below where it is a reward with its sign changed.
        "held_out_ratio": after / before if before > 0 else None,
        "exact_match": evaluation.get("exact_match"),
        "comparison": [*evaluation.get("comparison", []), *_on_the_export(manifests)],
        "tokens_per_second": training["tokens_per_second"],
        "fill": training["fill"],
        "data_wait_share": training["data_wait_share"],
        "mfu": training["mfu"],
        "mfu_measured": training["mfu_measured"],
        "hfu": training["hfu"],
        "peak_memory_gib": training["peak_memory_gib"],
        "export": manifests["export"].outputs["hf"].uri,
        "checks_passed": all(check.passed for manifest in manifests.values() for check in manifest.checks),
    }


def check_gates(run_config: dict[str, Any], summary: Mapping[str, Any]) -> None:
    """Print the summary and hold it against ``evaluation.gates``.

    Raises:
        TrainingError: a gate does not hold; the export stays in the store, the run counts as failed.
    """
    match = summary["exact_match"] or {}
    worse = " (training made it worse)" if summary["held_out_after"] > summary["held_out_before"] else ""
    print(f"{summary['held_out_is']} {summary['held_out_before']:.4f} -> {summary['held_out_after']:.4f}{worse}")
    if summary["data_end"]:
        print(summary["data_end"])
    for row in [row for row in summary.get("comparison", []) if row["task"] == "held_out" and "/" in row["metric"]][:2]:
        means = ("not measured" if row[model] is None else f"{row[model]['mean']:.4f}" for model in ("before", "after"))
        print(f"held-out {row['metric']} {' -> '.join(means)}")
    if match:
        print(
            f"exact match {match['before']:.3f} -> {match['after']:.3f} on {match['prompts']} held-out prompts "
            f"(always answering '{match['majority_answer']}' would give {match['majority']:.3f})"
        )
    speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
    shares = [f"{name} {summary[key]:.1%}" for name, key in _PEAK_SHARES.items() if summary.get(key) is not None]
    print(", ".join([speed, f"fill {summary['fill']:.3f}", *shares, f"{summary['peak_memory_gib']:.2f} GiB"]))
    print(f"exported to {summary['export']}")
    for gate in gate_results(run_config, summary):
        if not gate["holds"]:
            raise TrainingError(
                f"the gate on {gate['name']} does not hold",
                where="evaluation.gates",
                got="not measured" if gate["value"] is None else f"{gate['value']:.4f}",
                expected=f"{gate['sense']} {gate['limit']}",
                fix="look at the curves in the report card; train longer, or state another gate",
            )


def gate_results(run_config: dict[str, Any], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{name, value, limit, sense, holds} of each gate that the run file states; value is None where it was not
    measured, and the gate then does not hold."""
    gates = RunConfig.model_validate(run_config).evaluation.gates
    match = summary["exact_match"] or {}
    comparison = {(row["task"], row["metric"]): row for row in summary.get("comparison", []) if row["group"] == "all"}
    demands = [
        ("held-out loss ratio", summary["held_out_ratio"], gates.max_held_out_loss_ratio, "at most"),
        ("exact match", match.get("after"), gates.min_exact_match, "at least"),
        ("exact match over majority", _margin(match), gates.min_exact_match_over_majority, "at least"),
        *_demands(gates.metrics, comparison),
    ]
    results = []
    for name, value, limit, sense in demands:
        if limit is not None:
            holds = value is not None and (value <= limit if sense == "at most" else value >= limit)
            results.append({"name": name, "value": value, "limit": limit, "sense": sense, "holds": holds})
    return results


def _demands(
    gates: Mapping[str, MetricGate], comparison: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterator[tuple[str, float | None, float | None, str]]:
    """What gates on tasks' metrics say: what of which value, the value, its limit, and from which side."""
    for name, gate in gates.items():
        task, _, metric = name.partition(".")
        row = comparison.get((task, metric), {})
        value, change = (found["mean"] if (found := row.get(kind)) else None for kind in ("after", "difference"))
        yield name, value, gate.min, "at least"
        yield name, value, gate.max, "at most"
        yield f"the change of {name}", change, gate.min_change, "at least"
        yield f"the change of {name}", change, gate.max_change, "at most"


def _on_the_export(manifests: Manifests) -> list[dict[str, Any]]:
    """Rows of what was asked of the exported folder, if anything."""
    return manifests["lm_eval"].metrics["comparison"] if "lm_eval" in manifests else []


def _margin(match: Mapping[str, Any]) -> float | None:
    return match["after"] - match["majority"] if match else None


def collect(run_config: dict[str, Any], manifests: Manifests) -> dict[str, Any]:
    """Everything the report card draws, read from the manifests and the small files they name."""
    receipt = json.loads(_file(manifests, "prepare_data", "receipt"))
    evaluation = manifests["evaluate"].metrics
    train, reports = manifests["train"], list(map(json.loads, _file(manifests, "train", "metrics").splitlines()))
    return {
        "name": run_config["name"],
        "recipe": run_config["recipe"].upper(),
        "started_from": _started_from(manifests),
        "lacks": train.metrics.get("lacks", []),
        "headline": _headline(manifests),
        "data_end": train.metrics["data_end"],
        "reports": reports,
        "performance": _performance_table(train.metrics) + _batches_table(reports),
        "data": _data_table(receipt),
        "roles": _roles_table(receipt),
        "sources": _sources_table(train.metrics, reports),
        "findings": _findings_table(receipt),
        "notes": [[name.replace("_", " "), f"{count:,}"] for name, count in receipt["notes"].items() if count],
        "lengths": receipt["length_histogram"],
        "samples": json.loads(_file(manifests, "prepare_data", "samples"))[:4],
        "comparison": [*evaluation.get("comparison", []), *_on_the_export(manifests)],
        "calibration": evaluation.get("calibration", {}),
        "generations": evaluation["generations"],
        "lineage": lineage_of(manifests),
        "environment": {**train.environment, **train.hardware, **train.code},
    }


def _started_from(manifests: Manifests) -> list[list[str]]:
    """What made the model that the run began with, where it was named so."""
    origin = manifests["inputs"].metrics.get("model_origin")
    return [] if origin is None else [[name, _plain(value)] for name, value in origin.items() if value]


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _headline(manifests: Manifests) -> list[list[str]]:
    evaluation = manifests["evaluate"].metrics
    before, after = evaluation["held_out_before"], evaluation["held_out_after"]
    called = evaluation.get("held_out_is", HELD_OUT_LOSS)
    rows = [[f"{called}, {name}", f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in before]
    match = evaluation.get("exact_match")
    if match:
        rows.append(["exact match on held-out prompts", f"{match['before']:.3f}", f"{match['after']:.3f}"])
        rows.append([f"majority answer ('{match['majority_answer']}')", f"{match['majority']:.3f}", ""])
    return rows


def _data_table(receipt: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for source, counts in receipt["sources"].items():
        rows.append([source, *(f"{counts[key]:,}" for key in ("rows", "examples", "tokens", "trained_tokens"))])
    for reason, count in receipt["refused"].items():
        rows.append([f"refused: {reason}", f"{count:,}", "", "", ""])
    return rows


def _sources_table(training: Mapping[str, Any], reports: list[dict[str, Any]]) -> list[list[str]]:
    """What each source gave to training and its loss at the last step that had some of it."""
    rows = []
    for source, given in training["sources"].items():
        losses = [report["source_loss"][source] for report in reports if source in report["source_loss"]]
        shares = [f"{given['unit_share']:.2%}", f"{given['token_share']:.2%}"]
        first_and_last = [f"{loss:.4f}" for loss in losses[:1] + losses[-1:]] or ["", ""]  # mixed in, but not yet
        rows.append([source, f"{given['tokens']:,}", *shares, *first_and_last])
    return rows


def _performance_table(training: Mapping[str, Any]) -> list[list[str]]:
    """Speed, shares of the peak, where the time of an update went, and what held memory."""
    rows = [
        ["tokens/s", f"{training['tokens_per_second']:,.0f}"],
        ["trained tokens/s", f"{training['trained_tokens_per_second']:,.0f}"],
        ["model TFLOP/s", f"{training['model_tflops']:.4g}"],
    ]
    rows += [[name, f"{training[key]:.1%}"] for name, key in _PEAK_SHARES.items() if training[key] is not None]
    rows += [[f"time of an update: {kind}", f"{share:.1%}"] for kind, share in training["time_shares"].items()]
    rows += [[f"memory: {kind}", f"{size:.3f} GiB"] for kind, size in training["memory_gib"].items()]
    return [*rows, ["memory: peak", f"{training['peak_memory_gib']:.3f} GiB"]]


def _batches_table(reports: list[dict[str, Any]]) -> list[list[str]]:
    """Of rollouts: where the time of batches went, in the controller's own path, and how long roles had no work."""
    batches = [figures for report in reports if "time/batch_seconds" in (figures := report["figures"])][1:]
    spent, idle = Counter[str](), Counter[str]()
    for figures in batches:
        for name, value in figures.items():
            if name.startswith("time/"):
                spent[name.removeprefix("time/").removesuffix("_seconds")] += value
            elif name.startswith("idle/"):
                idle[name.removeprefix("idle/")] += value * figures["time/batch_seconds"]
    whole = spent.pop("batch", 0.0)
    rows = [[f"time of a batch: {name.replace('_', ' ')}", f"{time / whole:.1%}"] for name, time in spent.items()]
    return rows + [[f"without work: {role}", f"{time / whole:.1%}"] for role, time in idle.items()]


def _findings_table(receipt: Mapping[str, Any]) -> list[list[str]]:
    """What looks odd about the data, with the first places: nothing was refused for it."""
    near = receipt["near_duplicates"]
    rows = [
        ["near-duplicate examples", f"{near['near_duplicates']:,}", _pairs_of(near["first"])],
        [
            "held-out examples that training nearly has",
            f"{near['held_out_near_training']:,}",
            _pairs_of(near["first_held_out"]),
        ],
        [
            "examples too much like many others to be compared with all of them",
            f"{near['crowded']:,}",
            "the numbers of near-duplicates may be too low",
        ],
    ]
    for source, found in receipt["oddities"].items():
        for kind, what in found["oddities"].items():
            rows.append([f"{source}: {kind.replace('_', ' ')}", f"{what['rows']:,}", _places_of(what["first"])])
        for script, what in found["unusual_scripts"].items():
            rows.append([f"{source}: unusual script, {script}", f"{what['rows']:,}", _places_of(what["first"])])
    for finding, what in (receipt["pairs"] or {}).get("findings", {}).items():
        rows.append([f"pairs: {finding.replace('_', ' ')}", f"{what['rows']:,}", ", ".join(what["first"][:2])])
    return [row for row in rows if row[1] != "0"]


def _pairs_of(first: list[dict[str, Any]]) -> str:
    return "; ".join(f"{pair['a']} ~ {pair['b']} ({pair['similarity']:.2f})" for pair in first[:2])


def _places_of(first: list[dict[str, Any]]) -> str:
    return "; ".join(f"{place['row_id']}: {place['place']}" for place in first[:2])


def _roles_table(receipt: Mapping[str, Any]) -> list[list[str]]:
    return [
        [source, role, f"{counts['tokens']:,}", f"{counts['trained']:,}"]
        for source, roles in receipt["roles"].items()
        for role, counts in roles.items()
    ]


def _file(manifests: Manifests, step: str, output: str) -> str:
    return Path(manifests[step].outputs[output].uri).read_text(encoding="utf-8")
