"""Keep the figures of a run of reinforcement learning as a result file, by its run file; what the store has is not run
again:

    POSTTRAIN_DATA=DATA python -m tests.benchmarks.record_rollouts --config configs/grpo/gsm8k.yaml --output FILE

The reward of training's answers by update with its parts, the looks at held-out prompts, and the times of the steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from posttrain_lib.config import load_run_config
from posttrain_lib.schema.manifests import StepManifest
from steps.pipeline import run_until
from tests.benchmarks.recording import Recording, argument_parser

#: updates whose mean is told of the beginning and of the end
_SOME = 10


def figures(manifests: dict[str, StepManifest]) -> dict[str, Any]:
    """Of a run up to its step ``train``."""
    train = manifests["train"]
    lines = Path(train.outputs["metrics"].uri).read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    updates = [report["figures"] for report in reports if report["step"] and "resumed" not in report["event"]]
    names = sorted(name for name in updates[0] if name.startswith(("reward/", "rollout/correct", "rollout/tokens")))
    return {
        "commit_of_the_run": train.code,
        "updates": len(updates),
        f"first_{_SOME}_updates": {name: round(mean(each[name] for each in updates[:_SOME]), 4) for name in names},
        f"last_{_SOME}_updates": {name: round(mean(each[name] for each in updates[-_SOME:]), 4) for name in names},
        "reward_by_update": [round(each["reward/mean"], 4) for each in updates],
        "held_out_by_update": {report["step"]: report["held_out_figures"] for report in reports if report["held_out"]},
        "largest_mismatch_kl": max(each["mismatch/kl"] for each in updates),
        "seconds": {name: round(manifest.seconds, 1) for name, manifest in manifests.items()},
        "parameters": manifests["convert_model"].metrics["parameters"],
    }


def main() -> None:
    """Run what is not in the store, and write the record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides")
    options = parser.parse_args()
    recording = Recording()
    found = figures(run_until("train", load_run_config(options.config, options.set)))
    recording.write(options.output, {"config": str(options.config), **found})
    print(json.dumps({name: value for name, value in found.items() if name.endswith("updates")}, indent=1))


if __name__ == "__main__":
    main()
