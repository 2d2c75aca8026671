"""A training job small enough for a test: a Qwen3 of 8 thousand parameters and token stores of random documents.

Also a command, so that a test can kill the process that trains:

    python -m tests.oracles.tiny_job <folder> <steps> [pause_seconds]

prints one line per step, ``<step> <loss as hex float>``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.config.train import TrainConfig
from posttrain_lib.data.assemble import assemble, segments_of, store_filler
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.data.units import units_of
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.training.job import TrainJob

VOCABULARY = 64
SOURCES = ("chat", "tools")

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "use_sliding_window": False,
    "dtype": "float32",
}


def pack_rows(store: TokenStore, rows: Sequence[Sequence[int]], row_tokens: int) -> PackedBatch:
    """These rows of examples, packed as the loader packs them, nothing shared."""
    segments = segments_of(store, units_of(store, store.longest, share_prefixes=False), Rows.of(rows))
    return assemble(segments, store_filler(store, segments), row_tokens, len(rows))[0]


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with random weights, without a tokenizer."""
    import torch
    from safetensors.torch import save_file

    from posttrain_lib.checkpoint.hf import stored_tensors
    from posttrain_lib.models.families import spec_from_config
    from posttrain_lib.models.scratch import initial_weights

    content = {**HF_CONFIG, **changes}
    spec = spec_from_config(content)
    # Five times the usual spread: gradients of a fresh model this small would otherwise vanish in the tolerance.
    weights = {name: t if t.ndim == 1 else t * 5 for name, t in initial_weights(spec, seed)}
    weights = stored_tensors(spec, weights, torch.float32)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_store(folder: Path, examples: int, seed: int, longest: int = 32) -> Path:
    """Documents of 2 to ``longest`` tokens in which the next token follows from the last, half of them trained on."""
    random = np.random.default_rng(seed)
    with TokenStoreWriter(folder) as writer:
        for number in range(examples):
            length = int(np.clip(2 + random.exponential(longest / 4), 2, longest))
            start, stride = random.integers(0, VOCABULARY), 1 + number % len(SOURCES)
            tokens = (start + stride * np.arange(length)) % VOCABULARY
            weights = (random.random(length) < 0.5) * (1.0 if number % 3 else 0.5)
            weights[-1] = 1.0
            writer.add(
                TokenizedExample(
                    tokens.astype(np.int32), weights.astype(np.float32), SOURCES[number % len(SOURCES)], f"row:{number}"
                )
            )
    return folder


def tiny_config(**changes: Any) -> TrainConfig:
    """Eight rows of 32 tokens a step; ``changes`` replace fields of the train section."""
    settings: dict[str, Any] = {
        "steps": 6,
        "row_tokens": 32,
        "rows_per_step": 8,
        "micro_batch_rows": 2,
        "packing_buffer": 16,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 2, "min_ratio": 0.1},
        "evaluate_every_steps": 3,
        "checkpoint": {"every_steps": 2, "keep_last": 2},
    }
    return TrainConfig.model_validate({**settings, **changes})


def make_job(
    folder: Path, config: TrainConfig, work: str = "work", architecture: dict[str, Any] | None = None, **changes: Any
) -> TrainJob:
    """The job in ``folder``; model (of ``architecture``) and stores are written on first use."""
    if not (folder / "model").exists():
        write_model(folder / "model", **(architecture or {}))
        write_store(folder / "train", 200, seed=1)
        write_store(folder / "held_out", 30, seed=2)
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, **changes}
    return TrainJob(
        model_folder=str(folder / "model"),
        train_store=str(folder / "train"),
        held_out_store=str(folder / "held_out"),
        work_dir=str(folder / work),
        train=config,
        **settings,
    )


def main() -> None:
    """See the module's text."""
    from posttrain_lib.training.loop import train

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    for report in train(make_job(folder, tiny_config(steps=steps), work="killed")):
        print(report.step, "-" if report.loss is None else float(report.loss).hex(), report.event, flush=True)
        time.sleep(pause)


if __name__ == "__main__":
    main()
