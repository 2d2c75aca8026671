"""A job of rollouts small enough for a test: a tiny model that speaks, a few word problems, a grader."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain_lib.config.train import TrainConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.rl.job import RolloutJob
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.run import train_on_rollouts
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.schema.rollouts import Answer
from posttrain_lib.training.job import TrainJob
from tests.support.dialogues import prompt_of, sampling_of

#: rows as GSM8K has them
PROBLEMS = [
    ("Mia has 3 apples and buys 4. How many?", "She has 3+4=7.\n#### 7"),
    ("A box has 6 rows of 8. How many?", "6*8=48.\n#### 48"),
    ("Tom reads 9 pages of 30. How many are left?", "30-9=21.\n#### 21"),
    ("5 friends share 40 nuts. How many each?", "40/5=8.\n#### 8"),
]


def write_prompts(path: Path, tokenizer: ChatTokenizer, problems: Sequence[tuple[str, str]] = PROBLEMS) -> Path:
    """Prompts as step ``prepare_data`` writes them."""
    prompts = [prompt_of(tokenizer, text, answer, str(number)) for number, (text, answer) in enumerate(problems)]
    rows = [
        {
            "source": prompt.source,
            "row_id": prompt.row_id,
            "prompt_ids": prompt.token_ids,
            "messages": prompt.messages,
            "answer": prompt.answer,
            "tools": [],
            "extra": {},
        }
        for prompt in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_tokens(answer: Answer) -> float:
    """A grader: what an answer's calls and tokens come to."""
    return answer.extra.get("environment", {}).get("calls", 0) + answer.tokens / 100


def train_tiny(
    talker: Path,
    tokenizer: ChatTokenizer,
    work: Path,
    *,
    updates: int = 2,
    new_tokens: int = 12,
    row_tokens: int = 512,
    settings: dict[str, Any] | None = None,
    **rollouts: Any,
) -> list[StepReport]:
    """Run to the end: four groups of two a batch, one update each. ``rollouts``: fields of the RolloutJob."""
    work.mkdir(exist_ok=True)
    prompts = write_prompts(work / "prompts.jsonl", tokenizer)
    train = TrainConfig.model_validate(
        {
            "steps": updates,
            "row_tokens": row_tokens,
            "micro_batch_rows": 2,
            "optimizer": {"lr": 1e-3},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "loss": "policy",
            "checkpoint": {"every_steps": 50},
        }
    )
    job = TrainJob(str(talker), "", "", str(work), train, device="cpu", threads=1)
    told = RLSettings(
        updates=updates,
        prompts_per_batch=len(PROBLEMS),
        group_size=2,
        sampling=sampling_of(tokenizer, new_tokens),
        held_out=HeldOut(prompts=2, every_steps=50),
        **(settings or {}),
    )
    wanted = RolloutJob(
        prompts=str(prompts),
        held_out=str(prompts),
        tokenizer=str(talker),
        settings=told,
        rewards=(RewardSpec(f"{__name__}:by_tokens", "tokens"),),
        longest_prompt=row_tokens - new_tokens,
        **{"template_date": "2026-01-01", **rollouts},
    )
    return list(train_on_rollouts(dataclasses.replace(job, rollouts=wanted), wanted))
