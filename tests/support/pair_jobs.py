"""Training jobs on pairs, small enough for a test, with the frozen model that a loss compares with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.data.units import LEAST_SHARED
from posttrain_lib.evaluation.frozen import store_document_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.schema.companion import Companion
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import SOURCES, VOCABULARY, make_job, tiny_config, write_model

#: a prompt and two answers fit, alone or with others
ROW_TOKENS = 96
#: of a score head: no document ends with it
PADDING = 0


def write_pairs(folder: Path, pairs: int, seed: int) -> Path:
    """Pairs of two sources: a prompt of up to 24 tokens, an answer that goes on as the prompt does, and one of noise.
    The last fifth's prompts are too short to be shared."""
    random = np.random.default_rng(seed)
    with TokenStoreWriter(folder) as writer:
        for number in range(pairs):
            short = number >= pairs * 4 // 5
            length = int(random.integers(2, 6) if short else random.integers(LEAST_SHARED + 1, 25))
            start, stride = random.integers(0, VOCABULARY), 1 + number % len(SOURCES)
            for rejected in range(2):
                answer = int(random.integers(2, 9))
                ids = (start + stride * np.arange(length + answer)) % (VOCABULARY - 1) + 1
                if rejected:
                    ids[length:] = random.integers(1, VOCABULARY, answer)
                weights = (np.arange(len(ids)) >= length).astype(np.float32)
                source = SOURCES[number % len(SOURCES)]
                example = TokenizedExample(ids.astype(np.int32), weights, source, f"row:{number}")
                writer.add(example, kind="pair", shared=length - 1 if rejected else 0, row=(0, number))
    return folder


def pair_config(loss: str = "dpo", **changes: Any) -> Any:
    """Three rows of a few pairs each a step, in two micro-batches."""
    settings = {"loss": loss, "row_tokens": ROW_TOKENS, "rows_per_step": 4, "micro_batch_rows": 2, **changes}
    return tiny_config(**settings)


def pair_job(folder: Path, config: Any, work: str = "work", architecture: Any = None, **changes: Any) -> TrainJob:
    """As ``tiny_job.make_job``, on pairs."""
    if not (folder / "model").exists():
        write_model(folder / "model", **(architecture or {}))
        write_pairs(folder / "train", 120, seed=1)
        write_pairs(folder / "held_out", 20, seed=2)
    return make_job(folder, config, work, **changes)


def live(folder: Path, name: str = "model") -> Companion:
    """The model of ``folder / name`` beside the trained one."""
    return Companion("live", folder=str(folder / name))


def stored_logprobs(folder: Path, name: str = "model") -> Companion:
    """What that model says of both stores, written down on first use."""
    tables = {split: folder / f"{name}-logprobs-{split}" for split in ("train", "held_out")}
    for split, table in tables.items():
        if not table.exists():
            store = TokenStore(folder / split)
            store_document_logprobs(load_model(folder / name), store, table, {"model": name}, row_tokens=ROW_TOKENS)
    return Companion("stored", tables={split: str(table) for split, table in tables.items()}, made_of={"model": name})
