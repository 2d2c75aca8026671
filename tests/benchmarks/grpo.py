"""Reinforcement learning beside TRL's GRPOTrainer, in one run: samples a second, memory, and the reward by update.

    python -m tests.benchmarks.grpo --output tests/benchmarks/results/grpo.json

The default run file (configs/grpo/default.yaml) after its warm start, which is made once. Each run is a process of its
own, and the systems take turns within each round, which has a seed of its own. "ours, ahead" asks for a batch while the
one before it is learned (``max_staleness: 1``). The first update of a process is left out of its rates: it pays for
warming up. Ratios are of the medians over rounds. Neither system warms its learning rate up: they count a warm-up's
updates from different numbers. Memory is the resident peak of the process itself, and that over its imports; ours
grades in one process more, which is not counted. Loads are those of the whole machine, 1 minute's average, as each
process begins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.benchmarks.recording import Recording, argument_parser, load

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = {"ours": ("ours", 0), "trl": ("trl", 0), "ours, ahead": ("ours", 1)}
#: a reward that counts as learned, of the mean over so many updates
LEARNED, OVER = 0.9, 3


@dataclass(frozen=True)
class Start:
    """What the steps before training made."""

    model: str
    prompts: str
    held_out: str


def prepare(store: Path, config: Any) -> Start:
    """Run the chain up to the warm start, or find it in the store."""
    os.environ["POSTTRAIN_STORE"] = str(store)
    from steps.pipeline import run_until

    manifests = run_until("warm_start", config)
    data = manifests["prepare_data"].outputs
    return Start(manifests["warm_start"].outputs["model"].uri, data["train_prompts"].uri, data["prompts"].uri)


def run(name: str, setup: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One process: what it says, the load it met, and its rate."""
    system, staleness = SYSTEMS[name]
    grpo = {**setup["config"]["grpo"], "max_staleness": staleness}
    path = scratch / "setup.json"
    path.write_text(json.dumps({**setup, "config": {**setup["config"], "grpo": grpo}}), encoding="utf-8")
    begins = load()
    command = [sys.executable, "-m", "tests.benchmarks.grpo_systems", system, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup["threads"])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"grpo: {name} failed\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    samples = grpo["prompts_per_step"] * grpo["group_size"]
    rate = samples * (len(found["seconds"]) - 1) / sum(found["seconds"][1:])
    return {"system": name, "seed": setup["seed"], "load": begins, "samples_per_second": round(rate, 1), **found}


def curve(rewards: list[float]) -> dict[str, Any]:
    """The mean over all updates (the curve's area), over the last ones, and the first update at which it is learned."""
    means = [mean(rewards[max(0, end - OVER) : end]) for end in range(1, len(rewards) + 1)]
    learned = next((end for end, value in enumerate(means, start=1) if end >= OVER and value >= LEARNED), None)
    return {"area": round(mean(rewards), 4), "last": round(mean(rewards[-10:]), 4), f"updates_to_{LEARNED}": learned}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one system's runs: medians, and the reward by update, mean over rounds."""
    rewards = [mean(values) for values in zip(*(one["rewards"] for one in runs), strict=True)]
    peaks = [one["memory_mib"]["peak"] for one in runs]
    rises = [one["memory_mib"]["peak"] - one["memory_mib"]["imports"] for one in runs]
    found = {
        "samples_per_second": median(one["samples_per_second"] for one in runs),
        "seconds_to_learn": [_seconds_to_learn(one) for one in runs],
        "peak_memory_mib": median(peaks),
        "peak_above_imports_mib": round(median(rises), 1),
        "completion_tokens": round(mean(mean(one["tokens"]) for one in runs), 2),
        "reward": curve(rewards),
        "reward_of_each": [curve(one["rewards"]) for one in runs],
        "reward_by_update": [round(value, 4) for value in rewards],
    }
    figures = [each for one in runs for each in one.get("figures", ())[1:]]
    if figures:
        found["means"] = {name: round(mean(each[name] for each in figures), 4) for name in sorted(figures[0])}
    return found


def _seconds_to_learn(one: dict[str, Any]) -> float | None:
    """Clock until the reward is learned; None where it is not."""
    updates = curve(one["rewards"])[f"updates_to_{LEARNED}"]
    return round(sum(one["seconds"][:updates]), 2) if updates else None


def comparison(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over TRL's."""
    ours, trl = found["ours"], found["trl"]
    ratio = round(ours["samples_per_second"] / trl["samples_per_second"], 2)
    return {
        "samples_per_second": ratio,
        "ahead_samples_per_second": round(found["ours, ahead"]["samples_per_second"] / trl["samples_per_second"], 2),
        "peak_memory": round(ours["peak_memory_mib"] / trl["peak_memory_mib"], 2),
        "peak_above_imports": round(ours["peak_above_imports_mib"] / trl["peak_above_imports_mib"], 2),
        "area": round(ours["reward"]["area"] - trl["reward"]["area"], 4),
        "to_reach": {"samples_per_second": 2.0, "reached": ratio >= 2.0},
    }


def main() -> None:
    """All rounds."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the run file, for both")
    parser.add_argument("--store", type=Path, help="where the steps before training are found or made")
    options = parser.parse_args()
    recording = Recording("trl", "accelerate", hidden={options.store: "STORE"})
    from posttrain_lib.config import load_run_config

    overrides = [f"train.steps={options.updates}", "train.schedule.warmup_steps=0", *options.set]
    config = load_run_config(ROOT / "configs" / "grpo" / "default.yaml", overrides)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        start = prepare(options.store or scratch / "store", config)
        setup = {"config": config.model_dump(mode="json"), "threads": options.threads, **asdict(start)}
        for seed in range(options.rounds):
            setup["config"]["train"]["seed"] = seed
            for system in SYSTEMS:
                runs[system].append(run(system, {**setup, "seed": seed}, scratch))
                last = runs[system][-1]
                print(system, seed, last["samples_per_second"], curve(last["rewards"]), f"load {last['load']}")
    found = {system: summary(each) for system, each in runs.items()}
    reached = comparison(found)
    print(json.dumps(reached, indent=1))
    loads = [
        {name: one[name] for name in ("system", "seed", "load", "samples_per_second")}
        for each in runs.values()
        for one in each
    ]
    shape = {"updates": options.updates, "rounds": options.rounds, "threads_of_each": options.threads}
    recording.write(options.output, {**shape, "ours_over_trl": reached, "systems": found, "runs": loads})


if __name__ == "__main__":
    main()
