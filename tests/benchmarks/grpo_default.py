"""The default run of reinforcement learning over three seeds: held-out accuracy before and after, and how long it took.

    ./infra/env python -m tests.benchmarks.grpo_default --output tests/benchmarks/results/grpo_default.json

Runs the steps of ``configs/grpo/default.yaml`` up to ``evaluate`` in a store of its own, once for each seed (of the
generated rows, the model, the warm start and the rollouts).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain_lib.config import load_run_config
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from steps.pipeline import run_until
from tests.benchmarks.recording import Recording, argument_parser


def seeded(seed: int) -> list[str]:
    """Overrides that give every draw of the run another seed."""
    warm = "grpo.warm_start"
    return [
        f"model.from_scratch.seed={seed}",
        f"train.seed={seed}",
        f"{warm}.train.seed={seed}",
        f"data.sources=[{{name: lookups, format: prompts, generate: {{of: lookups, rows: 3000, seed: {seed}}}}}]",
        f"{warm}.data.sources=[{{name: demonstrations, generate: {{of: lookups, rows: 8000, seed: {seed}}}}}]",
    ]


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run's figures."""
    config = load_run_config(PROJECT_ROOT / "configs" / "grpo" / "default.yaml", [*seeded(seed), *overrides])
    assert config.grpo is not None
    with tempfile.TemporaryDirectory() as store:
        os.environ["POSTTRAIN_STORE"] = store
        begun = time.monotonic()
        manifests = run_until("evaluate", config)
        seconds = time.monotonic() - begun
        lines = Path(manifests["train"].outputs["metrics"].uri).read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    held_out = {report["step"]: report["held_out_figures"]["pass@1"] for report in reports if report["held_out"]}
    rows = {row["metric"]: row for row in manifests["evaluate"].metrics["comparison"] if row["group"] == "all"}
    return {
        "seed": seed,
        "pass@1_before": rows["pass@1"]["before"],
        "pass@1_after": rows["pass@1"]["after"],
        "pass@1_by_update": held_out,
        "seconds": {name: round(manifest.seconds, 1) for name, manifest in manifests.items()},
        "seconds_in_all": round(seconds, 1),
        "prompts": config.grpo.held_out.prompts,
    }


def main() -> None:
    """Run every seed and write the record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further overrides")
    options = parser.parse_args()
    recording = Recording()
    runs = [run(seed, options.set) for seed in options.seeds]
    recording.write(options.output, {"runs": runs})
    for one in runs:
        before, after = one["pass@1_before"]["mean"], one["pass@1_after"]["mean"]
        print(f"seed {one['seed']}: {before:.3f} -> {after:.3f} in {one['seconds_in_all']:.0f} s")


if __name__ == "__main__":
    main()
