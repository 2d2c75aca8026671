"""A tiny job of rollouts, also as a command, so that a test can start it as a driver of its own:

    python -m tests.support.driven_rollouts <folder> <work> <compute section as JSON>

prints a line for each report, ``<step> <gradient norm as hex float> <event>``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from posttrain_lib.compute.launch import launch
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.rl.job import RolloutJob
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.schema.rollouts import Answer, Sampling
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import tiny_config, write_model


def even(answer: Answer) -> float:
    """Half of all answers are better than the rest."""
    return float(len(answer.text) % 2)


def write_inputs(folder: Path) -> Path:
    """A model with its tokenizer, and prompts."""
    write_model(folder / "model", vocab_size=320)
    rows = list(generate_rows(50, 0))
    build_tokenizer((turn["content"] for row in rows for turn in row["messages"]), 320, folder / "model")
    for name, count in (("train", 12), ("held_out", 2)):
        lines = [
            {
                "prompt_ids": [5 + number, 6, 7, 8],
                "messages": [{"role": "user", "content": "?"}],
                "answer": None,
                "source": name,
                "row_id": str(number),
            }
            for number in range(count)
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def job_in(folder: Path, work: str, updates: int = 3, reference: bool = True) -> TrainJob:
    """A job over those inputs, with a frozen model beside the policy if it has a ``reference``."""
    train = tiny_config(
        steps=updates,
        loss="policy",
        loss_options={"kl_weight": 0.05} if reference else {},
        optimizer={"lr": 1e-3},
        checkpoint={"every_steps": 1},
    )
    rollouts = RolloutJob(
        prompts=str(folder / "train"),
        held_out=str(folder / "held_out"),
        tokenizer=str(folder / "model"),
        settings=RLSettings(
            updates=updates,
            prompts_per_batch=2,
            group_size=4,
            sampling=Sampling(8),
            advantage="verl:grpo",
            save_every=1,
            held_out=HeldOut(prompts=2, every_steps=2),
        ),
        rewards=(RewardSpec("tests.support.driven_rollouts:even", "even"),),
        longest_prompt=16,
        template_date="2026-01-01",
        reference=str(folder / "model") if reference else None,
        max_mismatch=1e-3,
    )
    stores = {"train_store": "", "held_out_store": ""}
    return TrainJob(str(folder / "model"), work_dir=str(folder / work), train=train, rollouts=rollouts, **stores)


def drain(
    job: TrainJob, compute: ComputeConfig, watch: Callable[[StepReport], None] = lambda report: None
) -> tuple[list[StepReport], TrainResult]:
    """Run it to its end."""
    events, reports = launch(job, compute), []
    while True:
        try:
            reports.append(next(events))
        except StopIteration as end:
            return reports, end.value
        watch(reports[-1])


def main() -> None:
    """See the module's text."""
    job = job_in(Path(sys.argv[1]), sys.argv[2])
    reports, _ = drain(job, ComputeConfig(**json.loads(sys.argv[3])))
    for report in reports:
        print(report.step, float(report.grad_norm or 0).hex(), report.event, flush=True)


if __name__ == "__main__":
    main()
