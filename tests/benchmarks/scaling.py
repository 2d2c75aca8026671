"""One device against two, for every axis of the mesh: tokens per second, efficiency, share of communication.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.scaling --output tests/benchmarks/results/scaling.json

The same job, one thread a rank, on this machine's cores (gloo over loopback): the same global batch, so efficiency is
the rate over twice that of one device. Runs take turns; of each the first steps are left out. Communication is the time
that a rank's thread is blocked in collectives, from the reports' own clock: waiting for a slower rank is in it.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from posttrain_lib.compute.launch import launch
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from tests.benchmarks.recording import Recording, argument_parser
from tests.oracles.tiny_job import make_job, tiny_config, write_model, write_store

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
MESHES: dict[str, dict[str, int]] = {
    "one device": {},
    "shard 2": {"shard": 2},
    "replicate 2": {"replicate": 2, "shard": 1},
    "tensor 2": {"tensor": 2},
    "context 2": {"context": 2},
}
ROW_TOKENS = 256
ROWS = 4
#: first steps of a run that are left out: buffers, caches, the loader's first rows
WARM = 3


def run(job: TrainJob, mesh: dict[str, int], work: Path) -> dict[str, float]:
    """Tokens a second and the share of communication over the steps that count."""
    devices = 2 if mesh else 1
    compute = ComputeConfig.model_validate(
        {"devices_per_node": devices, "mesh": mesh, "device": "cpu", "threads_per_worker": 1}
    )
    events = launch(dataclasses.replace(job, work_dir=str(work)), compute)
    counted: list[StepReport] = [report for report in events if report.step > WARM]
    seconds = sum(report.step_seconds for report in counted)
    split = [report.seconds for report in counted]
    total = sum(sum(parts.values()) for parts in split)
    return {
        "tokens_per_second": sum(report.real_tokens for report in counted) / seconds,
        "communication": sum(parts.get("communication", 0.0) for parts in split) / total,
    }


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    config = tiny_config(
        steps=steps,
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS,
        micro_batch_rows=2,
        packing_buffer=64,
        share_prefixes=False,
        evaluate_every_steps=steps,
        checkpoint={"every_steps": steps},
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MESHES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", **MODEL)
        write_store(folder / "train", 4000, seed=1, longest=200)
        write_store(folder / "held_out", 8, seed=2, longest=200)
        job = make_job(folder, config)
        for number in range(rounds):
            for name, mesh in MESHES.items():
                found[name].append(run(job, mesh, folder / f"{name}-{number}".replace(" ", "-")))
                print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)
    rates = {name: statistics.median(item["tokens_per_second"] for item in found[name]) for name in MESHES}
    return {
        name: {
            "tokens_per_second": round(rates[name]),
            "efficiency": round(rates[name] / (rates["one device"] * (2 if mesh else 1)), 3),
            "communication_share": round(statistics.median(item["communication"] for item in found[name]), 3),
        }
        for name, mesh in MESHES.items()
    }


def main() -> None:
    """See the module's text."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    recording = Recording()
    meshes = measure(arguments.rounds, arguments.steps)
    for name, figures in meshes.items():
        print(f"{name:12} {figures}")
    model = {**MODEL, "row_tokens": ROW_TOKENS, "rows_per_step": ROWS}
    recording.write(arguments.output, {"rounds": arguments.rounds, "job": model, "meshes": meshes})


if __name__ == "__main__":
    main()
