"""Keep the figures of a finished run as a result file:

    python -m tests.benchmarks.record_run --command "python flows/sft_flow.py --config ... run" --output results.json

reads the latest successful SFTFlow run (``--run`` names another) from Metaflow: what was trained on what, on which
hardware, with which versions, and what came out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.benchmarks.recording import write_result


def figures(run: Any, command: str) -> dict[str, Any]:
    """The figures of a Metaflow run, from its manifests."""
    data, manifests = run.data, run.data.manifests
    train, evaluation = manifests["train"], manifests["evaluate"]["metrics"]
    receipt = manifests["prepare_data"]["metrics"]
    keys = ("tokens_per_second", "fill", "data_wait_share", "peak_memory_gib", "train_seconds", "tokens_seen", "step")
    return {
        "command": command,
        "date": train["started_at"][:10],
        "commit": train["code"].get("commit"),
        "uncommitted_changes": train["code"].get("uncommitted_changes"),
        "hardware": {key: train["hardware"][key] for key in ("cpu", "cores", "machine")},
        "versions": {key: train["environment"][key] for key in ("python", "torch", "transformers", "ray", "lock")},
        "parameters": manifests["convert_model"]["metrics"]["parameters"],
        "data": {"sources": receipt["sources"], "refused": receipt["refused"], "notes": receipt["notes"]},
        "train": {key: train["metrics"][key] for key in keys},
        "held_out_loss": {"before": evaluation["held_out_before"], "after": evaluation["held_out_after"]},
        "exact_match": evaluation.get("exact_match"),
        "seconds_per_step": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "checks": {
            f"{name}: {check['name']}": {key: check[key] for key in ("passed", "value", "limit")}
            for name, manifest in manifests.items()
            for check in manifest["checks"]
        },
        "config": data.run_config,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run id; default: the latest successful one")
    parser.add_argument("--command", required=True, help="the command that made the run, for the record")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from metaflow import Flow, namespace

    namespace(None)
    flow = Flow("SFTFlow")
    found = figures(flow[options.run] if options.run else flow.latest_successful_run, options.command)
    write_result(options.output, found)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
