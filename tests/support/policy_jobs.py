"""A tiny policy, samples for it, and the processes that play it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.compute.processes import descendants
from posttrain_lib.losses.policy import ADVANTAGES, REFERENCE, ROLLOUT
from posttrain_lib.rl.job import RolloutJob
from posttrain_lib.rl.settings import RLSettings
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from posttrain_lib.schema.rollouts import Sampling, TrainSample
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import VOCABULARY, make_job, tiny_config


def policy_job(
    folder: Path, work: str = "work", mesh: MeshSpec = SINGLE, reference: bool = False, **train: Any
) -> TrainJob:
    """Policy and (with ``reference``) a frozen model are the same tiny model in ``folder``."""
    settings: dict[str, Any] = {
        "steps": 4,
        "loss": "policy",
        "loss_options": {"kl_weight": 0.1} if reference else {},
        "checkpoint": {"every_steps": 1},
    }
    job = make_job(folder, tiny_config(**{**settings, **train}), work=work, mesh=mesh)
    rollouts = RolloutJob(
        prompts="",
        held_out="",
        tokenizer="",
        settings=RLSettings(updates=4, prompts_per_batch=2, group_size=2, sampling=Sampling(8)),
        rewards=(),
        longest_prompt=16,
        template_date="2026-01-01",
        reference=job.model_folder if reference else None,
    )
    return TrainJob(**{**vars(job), "rollouts": rollouts})


def random_samples(seed: int, groups: int = 3, group_size: int = 3, reference: bool = False) -> list[TrainSample]:
    """Samples of at most 32 tokens; those of a group have their prompt in common."""
    random = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt = random.integers(0, VOCABULARY, random.integers(2, 10)).astype(np.int32)
        for index in range(group_size):
            answer = random.integers(0, VOCABULARY, random.integers(1, 12)).astype(np.int32)
            count = len(answer)
            signals = {
                ADVANTAGES: np.full(count, random.normal(), np.float32),
                ROLLOUT: (-random.random(count) * 5).astype(np.float32),
                **({REFERENCE: (-random.random(count) * 5).astype(np.float32)} if reference else {}),
            }
            tokens = np.concatenate([prompt, answer])
            trained = np.arange(len(tokens)) >= len(prompt)
            samples.append(TrainSample(tokens, trained, len(prompt), group, index, signals))
    return samples


def too_long_sample() -> TrainSample:
    """Of 40 tokens, one of them trained."""
    whole = random_samples(0, groups=1, group_size=1, reference=True)[0]
    tokens = np.arange(40, dtype=np.int32)
    signals = {name: values[:1] for name, values in whole.signals.items()}
    return dataclasses.replace(whole, token_ids=tokens, trained=tokens > 38, signals=signals)


def actors() -> list[int]:
    """Processes below this one that are ranks."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if b"PolicyWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
