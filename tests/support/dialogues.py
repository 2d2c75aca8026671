"""A tokenizer of a few hundred tokens with the embedded template, prompts in it, and engines that speak it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.probes import stop_ids
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.trajectories import Complete
from posttrain_lib.schema.examples import Message
from posttrain_lib.schema.rollouts import Completion, Request, Sampling
from tests.oracles.tiny_job import write_model

VOCABULARY = 320
_TEXTS = ["How many apples are there? 48 / 2 + 48 = 72", "tool_call name calculator arguments expression"]


def write_talker(folder: Path, **changes: Any) -> Path:
    """A folder with a tiny model and a tokenizer of its vocabulary."""
    write_model(folder, vocab_size=VOCABULARY, max_position_embeddings=1024, **changes)
    build_tokenizer(_TEXTS * 20, VOCABULARY, folder)
    return folder


def tokenizer_of(folder: Path, template: Path | None = None) -> ChatTokenizer:
    return ChatTokenizer(folder, chat_template=template, engine="hf")


def prompt_of(tokenizer: ChatTokenizer, text: str, answer: str | None = None, name: str = "0") -> RolloutPrompt:
    ids = tokenizer.encode(tokenizer.render([Message("user", text)], answer_next=True)).ids
    return RolloutPrompt(tuple(ids.tolist()), ({"role": "user", "content": text},), answer, "asked", name)


def sampling_of(tokenizer: ChatTokenizer, new_tokens: int, **options: Any) -> Sampling:
    return Sampling(new_tokens, stop_ids=stop_ids(tokenizer), **options)


def scripted(tokenizer: ChatTokenizer, turns: Sequence[tuple[str, Any]], asked: list[Request]) -> Complete:
    """An engine whose completions are these texts with their finish; requests are kept in ``asked``."""
    left = list(turns)

    async def complete(request: Request) -> Completion:
        asked.append(request)
        text, finish = left.pop(0)
        ids = tokenizer.encode(text).ids.astype(np.int32)
        return Completion(
            request.key, ids, -np.arange(1, len(ids) + 1, dtype=np.float32), np.full(len(ids), 3, np.int32), finish
        )

    return complete
