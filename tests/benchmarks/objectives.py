"""The recipes beyond SFT on real data, one after the other:

    POSTTRAIN_DATA=FOLDER python -m tests.benchmarks.objectives --output tests/benchmarks/results/objectives.json

1. SFT on real conversations (configs/sft/chat_small.yaml): what the others go on from.
2. A reward model on real preferences: accuracy on held-out pairs, against chance.
3. DPO on the same pairs: held-out accuracy and margin before and after.
4. Distillation of that SFT model into a smaller one, beside the same student trained on the tokens alone, for equal
   tokens and several seeds: perplexity of the held-out answers.

About an hour and a half on two cores; results of equal work are taken from the store, so that an interrupted run goes
on, and ``--only`` does a part again. After the first, parts run with one thread each: two may run side by side.
"""

from __future__ import annotations

import json
import math
from typing import Any

from posttrain_lib.config import load_run_config
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import StepManifest
from steps.pipeline import run_until
from tests.benchmarks.recording import Recording, argument_parser

CONFIGS = PROJECT_ROOT / "configs"
PARTS = ("reward", "dpo", "distill")
ONE_THREAD = "compute.threads_per_worker=1"


def run(config: str, *overrides: str, until: str = "evaluate") -> dict[str, StepManifest]:
    """A recipe's chain up to a step, in this process."""
    return run_until(until, load_run_config(CONFIGS / config, overrides))


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of ``count`` (Wilson 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def held_out_pairs(manifests: dict[str, StepManifest]) -> int:
    """Pairs that accuracy is a share of."""
    pairs: int = manifests["prepare_data"].metrics["pairs"]["held_out"]
    return pairs


def on_pairs(manifests: dict[str, StepManifest]) -> dict[str, Any]:
    """Held-out loss and figures of a recipe on pairs, before and after."""
    rows = {row["metric"]: row for row in manifests["evaluate"].metrics["comparison"] if row["group"] == "all"}
    figures = {
        name: {"before": row["before"]["mean"], "after": row["after"]["mean"]}
        for name, row in rows.items()
        if row["before"] is not None
    }
    pairs = held_out_pairs(manifests)
    low, high = interval(figures["rewards/accuracy"]["after"], pairs)
    return {
        "held_out_pairs": pairs,
        "figures": figures,
        "accuracy_after_95": [low, high],
        "above_chance_by": low - 0.5,
        "steps": manifests["train"].metrics["step"],
        "tokens": manifests["train"].metrics["tokens_seen"],
    }


def perplexity(manifests: dict[str, StepManifest]) -> dict[str, float]:
    """Of the held-out answers, before and after."""
    rows = manifests["evaluate"].metrics["comparison"]
    row = next(row for row in rows if row["metric"] == "perplexity" and row["group"] == "all")
    return {when: row[when]["mean"] for when in ("before", "after")}


def distillation(teacher: str, seeds: int) -> list[dict[str, Any]]:
    """The student with and without the teacher: equal tokens, order and beginnings."""
    found = []
    for seed in range(seeds):
        same = (f"train.seed={seed}", f"model.from_scratch.seed={seed}", ONE_THREAD)
        taught = run("distill/chat.yaml", f"distill.teacher.path={teacher}", *same)
        alone = run("distill/chat.yaml", "recipe=sft", "distill=null", *same)
        tokens = [manifests["train"].metrics["tokens_seen"] for manifests in (taught, alone)]
        assert tokens[0] == tokens[1], "the comparison is at equal tokens"
        found.append(
            {"seed": seed, "tokens": tokens[0], "distilled": perplexity(taught), "tokens_alone": perplexity(alone)}
        )
    return found


def main() -> None:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to do; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of the distillation")
    options = parser.parse_args()
    parts, recording = options.only or PARTS, Recording()
    base = run("sft/chat_small.yaml", until="export")
    folder = base["export"].outputs["hf"].uri
    found: dict[str, Any] = {"sft": {"perplexity": perplexity(base), "tokens": base["train"].metrics["tokens_seen"]}}
    for part in ("reward", "dpo"):
        if part in parts:
            found[part] = on_pairs(run(f"{part}/preference.yaml", f"model.path={folder}", ONE_THREAD))
    if "distill" in parts:
        found["distill"] = distillation(folder, options.seeds)
    print(json.dumps(found, indent=1))
    recording.write(options.output, {"figures": found})


if __name__ == "__main__":
    main()
