"""A tiny job of rollouts: a model and a tokenizer from scratch, prompts, and a grader that any model can please."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain_lib.checkpoint.hf import save_hf_folder
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.probes import stop_ids
from posttrain_lib.embedded.lookups import generate_questions
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.scratch import write_scratch_model
from posttrain_lib.rl.job import RolloutJob
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.schema.examples import Message
from posttrain_lib.schema.rollouts import Answer, Sampling
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import tiny_config

ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
NEW_TOKENS = 8


def short(answer: Answer) -> float:
    """The fewer tokens the better: what a model can learn in a few updates, by ending its turn."""
    return 1.0 - answer.tokens / NEW_TOKENS


def write_parts(folder: Path, prompts: int = 24) -> ChatTokenizer:
    """Tokenizer, model and prompt files in ``folder``."""
    rows = list(generate_questions(prompts + 8, 0))
    build_tokenizer((row["prompt"] for row in rows), 300, folder / "tokenizer")
    write_scratch_model("qwen3", ARCHITECTURE, folder / "tokenizer", 0, folder / "model")
    tokenizer = ChatTokenizer(folder / "tokenizer")
    for name, part in (("prompts", rows[:prompts]), ("held_out", rows[prompts:])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as handle:
            for row in part:
                messages = [{"role": "user", "content": row["prompt"]}]
                asked = tokenizer.render((Message("user", row["prompt"]),), (), answer_next=True)
                ids = tokenizer.encode(asked).ids.tolist()
                line = {
                    "source": "questions", "row_id": row["id"], "prompt_ids": ids, "messages": messages,
                    "answer": row["answer"], "tools": [], "extra": {},
                }  # fmt: skip
                handle.write(json.dumps(line) + "\n")
    return tokenizer


def rl_settings(tokenizer: ChatTokenizer, **changes: Any) -> RLSettings:
    """Four prompts of four answers a batch; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "updates": 6,
        "prompts_per_batch": 4,
        "group_size": 4,
        "sampling": Sampling(NEW_TOKENS, stop_ids=frozenset(stop_ids(tokenizer))),
        "save_every": 2,
        "held_out": HeldOut(prompts=4, samples=2, every_steps=3),
    }
    return RLSettings(**{**fields, **changes})


def rollout_job(
    folder: Path,
    work: str = "work",
    *,
    rewards: Sequence[RewardSpec] = (RewardSpec("tests.support.rollout_jobs:short", "short"),),
    train: dict[str, Any] | None = None,
    rollouts: dict[str, Any] | None = None,
    **settings: Any,
) -> TrainJob:
    """The job in ``folder``; what it needs is written on first use."""
    written = (folder / "model").exists()
    tokenizer = ChatTokenizer(folder / "tokenizer") if written else write_parts(folder)
    changes = {"row_tokens": 160, "steps": settings.get("updates", 6), "loss": "policy", **(train or {})}
    return TrainJob(
        model_folder=str(folder / "model"),
        train_store="",
        held_out_store="",
        work_dir=str(folder / work),
        train=tiny_config(**changes),
        device="cpu",
        threads=1,
        rollouts=RolloutJob(
            prompts=str(folder / "prompts.jsonl"),
            held_out=str(folder / "held_out.jsonl"),
            tokenizer=str(folder / "tokenizer"),
            settings=rl_settings(tokenizer, **settings),
            rewards=tuple(rewards),
            longest_prompt=160 - NEW_TOKENS,
            template_date="2026-01-01",
            **{"max_mismatch": 1e-3, **(rollouts or {})},
        ),
    )


class Solved:
    """Right are the answers to one prompt in two or so, whatever they say."""

    def __call__(self, answer: Answer) -> Verdict:
        """By the prompt alone."""
        right = zlib.crc32(str(answer.prompt[-1]["content"]).encode()) % 2 == 0
        return Verdict(float(answer.tokens), right)


def write_teacher(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """``teacher-model``: the job's model with other weights."""
    model = spec_from_folder(folder / "model")
    save_hf_folder(weights, model, folder / "model", folder / "teacher-model", "float32")


def constant(answer: Answer) -> float:
    """Nothing to learn from."""
    return 0.5


def fails_on_some(answer: Answer) -> float:
    """Raises for one answer in three or so."""
    number = zlib.crc32(answer.text.encode())
    if number % 3 == 0:
        raise ValueError("I do not like such answers")
    return float(number % 2)


def fails_on_prompts(answer: Answer) -> float:
    """Raises for all answers to one prompt in four or so, so that batches lose whole groups."""
    if zlib.crc32(str(answer.prompt[-1]["content"]).encode()) % 4 == 0:
        raise ValueError("I do not like such prompts")
    return short(answer)


def raises(answer: Answer) -> float:
    """Never says anything."""
    raise RuntimeError("broken")
