"""Effective training tokens/s, packed against padded: one model, one loss, the same documents.

Documents are a systematic sample of the real set. Each round every system trains on the next part of them; the packed
one on rows of this project's loader, the others on batches of documents padded to the longest of the batch in shuffled
order, or to the longest of the whole set. "own" runs this project's model on the padded batch: a padded row is one
document, so attention covers the padding as a dense implementation's does; padding has weight 0, so the head skips it,
which is to the padded system's advantage. "transformers" is its Qwen3 with attention_mask and labels. As many documents
make an optimiser step on average everywhere. Only tokens of the documents count, whatever a system computes. The packed
stream has no end, as in training: it goes on into the next epoch where the sample is used up. One thread: the barriers
of several cost more than they gain where other work shares the cores.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain_lib.checkpoint.hf import stored_tensors
from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.order import epoch_permutation
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.scratch import initial_weights
from posttrain_lib.schema.batches import PackedBatch
from tests.benchmarks.packing_data import PADDED_BATCH, SEED, statistics_of, systematic_sample, written_store

VOCABULARY = 4096
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "use_sliding_window": False,
    "dtype": "float32",
}
LEARNING_RATE = 1e-3


@dataclass
class System:
    """One way to train. ``micro_batch`` runs forward and backward and returns the loss sum; the optimiser steps after
    every ``per_step`` of them."""

    model: torch.nn.Module
    per_step: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pending: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, foreach=True)

    def train(self, work: Iterator[tuple[Callable[[torch.nn.Module], torch.Tensor], float, float]]) -> None:
        """One round: (forward that gives the summed loss, its divisor, real tokens) by micro-batch."""
        begun, tokens = time.perf_counter(), 0.0
        for forward, divisor, real in work:
            loss = forward(self.model) / divisor / self.per_step
            loss.backward()
            self.losses.append(float(loss.detach()) * self.per_step)
            tokens, self.pending = tokens + real, self.pending + 1
            if self.pending == self.per_step:
                self._step()
        self.seconds.append(time.perf_counter() - begun)
        self.tokens.append(tokens)

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = 0

    def figures(self) -> dict[str, Any]:
        """Rates over all rounds; by round where the work of a round is like that of another."""
        rates = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        return {
            "real_tokens": round(sum(self.tokens)),
            "seconds": round(sum(self.seconds), 2),
            "real_tokens_per_second": round(sum(self.tokens) / sum(self.seconds), 1),
            "real_tokens_per_second_by_round": [round(rate, 1) for rate in rates],
            "micro_batches": len(self.losses),
            "loss_first_and_last": [round(self.losses[0], 3), round(self.losses[-1], 3)],
            "losses_finite": all(map(math.isfinite, self.losses)),
        }


def own_model() -> torch.nn.Module:
    """This project's decoder, the same weights every time."""
    spec = spec_from_config(MODEL)
    model = build_model(spec)
    with torch.no_grad():
        for name, weight in initial_weights(spec, SEED):
            model.get_parameter(name).copy_(weight)
    return model


def transformers_model() -> torch.nn.Module:
    """Qwen3 of transformers with the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM._from_config(Qwen3Config(**MODEL), attn_implementation="sdpa")
    spec = spec_from_config(MODEL)
    with torch.no_grad():
        for name, weight in stored_tensors(spec, dict(initial_weights(spec, SEED)), torch.float32).items():
            model.get_parameter(name).copy_(weight)
    return model


def own_loss(batch: PackedBatch) -> Callable[[torch.nn.Module], torch.Tensor]:
    """Forward of a batch (numpy) through this project's model; the copy to tensors is part of it."""

    def forward(model: torch.nn.Module) -> torch.Tensor:
        assert isinstance(model, Decoder)
        return SFTLoss()(model, to_torch(batch)).local_sum

    return forward


def padded_batch(documents: list[np.ndarray], width: int) -> PackedBatch:
    """Documents as rows of ``width``, each row one document as far as attention goes."""
    rows = len(documents)
    token_ids, targets = (np.zeros((rows, width), np.int32) for _ in range(2))
    weights = np.zeros((rows, width), np.float32)
    for row, tokens in enumerate(documents):
        token_ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens) - 1], weights[row, : len(tokens) - 1] = tokens[1:], 1.0
    flat = weights.reshape(-1)
    return PackedBatch(
        token_ids=token_ids.reshape(-1),
        target_ids=targets.reshape(-1),
        loss_weights=flat,
        positions=np.tile(np.arange(width, dtype=np.int32), rows),
        cu_seqlens=np.arange(rows + 1, dtype=np.int32) * width,
        supervised_index=np.flatnonzero(flat),
        document_sources=np.zeros(rows, np.int32),
        document_ids=np.arange(rows),
        max_seqlen=width,
        real_tokens=sum(map(len, documents)),
    )


def transformers_loss(documents: list[np.ndarray], width: int) -> Callable[[torch.nn.Module], torch.Tensor]:
    """Forward of the padded batch through transformers' model; its loss is a mean, made a sum again."""
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = 1
    count = sum(len(tokens) - 1 for tokens in documents)
    return lambda model: model(input_ids=ids, attention_mask=mask, labels=labels).loss * count


def _padded(
    documents: list[np.ndarray], width: int | None, own: bool, real: float | None = None
) -> tuple[Callable[[torch.nn.Module], torch.Tensor], float, float]:
    width = width or max(map(len, documents))
    forward = own_loss(padded_batch(documents, width)) if own else transformers_loss(documents, width)
    return forward, float(sum(len(tokens) - 1 for tokens in documents)), real or float(sum(map(len, documents)))


def compare_training(
    documents: list[np.ndarray], scratch: Path, *, row_tokens: int, every: int, rounds: int, packing_buffer: int
) -> dict[str, Any]:
    """The figures of all systems over ``rounds`` interleaved rounds; see the module's text."""
    lengths = np.array([len(tokens) for tokens in documents])
    longest, mean = int(lengths.max()), float(lengths.mean())
    chosen = systematic_sample(lengths, every)
    sample = [documents[number] % VOCABULARY for number in chosen[epoch_permutation(len(chosen), SEED, 0)]]
    store = written_store(scratch, ((tokens, np.ones(len(tokens), np.float32)) for tokens in sample))
    batches = [sample[first : first + PADDED_BATCH] for first in range(0, len(sample), PADDED_BATCH)]
    per_step = max(1, round(row_tokens / mean / PADDED_BATCH))
    torch.set_num_threads(1)
    systems = {
        "packed": System(own_model(), 1),
        "padded to the batch, own": System(own_model(), per_step),
        "padded to the batch, transformers": System(transformers_model(), per_step),
        "padded to the longest, own": System(own_model(), per_step * PADDED_BATCH),
        "padded to the longest, transformers": System(transformers_model(), per_step * PADDED_BATCH),
    }
    waits: list[tuple[float, float]] = []
    feed = StoreFeed(store, row_tokens=row_tokens, seed=SEED)
    warm(systems, sample)
    with PackedLoader(feed, row_tokens=row_tokens, rows_per_step=1, packing_buffer=packing_buffer) as loader:
        rows = max(1, round(store.total_tokens / row_tokens / rounds))
        for number in range(rounds):
            systems["packed"].train(packed_work(loader, rows, waits))
            part = batches[number::rounds]
            for own, name in ((True, "own"), (False, "transformers")):
                systems[f"padded to the batch, {name}"].train(_padded(batch, None, own) for batch in part)
                # Every document costs the same here, so one of them, as long as the mean, stands for all.
                one = [min(sample, key=lambda tokens: abs(len(tokens) - mean))]
                systems[f"padded to the longest, {name}"].train(iter([_padded(one, longest, own, mean)]))
    figures = {name: system.figures() for name, system in systems.items()}
    check(figures, sample)
    ours = figures["packed"]["real_tokens_per_second"]
    wait, total = (sum(values) for values in zip(*waits[1:], strict=True))
    return {
        "model": {name: MODEL[name] for name in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size")},
        "row_tokens": row_tokens,
        "packing_buffer": packing_buffer,
        "documents_per_optimiser_step": per_step * PADDED_BATCH,
        "set": statistics_of(lengths, longest),
        "sample": {"one_in": every, **statistics_of(np.array([len(tokens) for tokens in sample]), longest)},
        "bound_longest_over_mean": round(longest / mean, 2),
        "systems": figures,
        "gain_over": {
            name: round(ours / found["real_tokens_per_second"], 2)
            for name, found in figures.items()
            if name != "packed"
        },
        "data_wait_share": round(wait / total, 6),
        "data_wait_seconds_first_step": round(waits[0][0], 6),
    }


def packed_work(
    loader: PackedLoader, wanted: int, waits: list[tuple[float, float]]
) -> Iterator[tuple[Callable[[torch.nn.Module], torch.Tensor], float, float]]:
    """The loader's next ``wanted`` steps; ``waits`` gets (seconds waited, seconds of the step)."""
    begun = time.perf_counter()
    for step in itertools.islice(loader, wanted):
        for batch in step.micro_batches:
            yield own_loss(batch), step.global_weight, float(batch.real_tokens)
        waits.append((step.data_wait_seconds, time.perf_counter() - begun))
        begun = time.perf_counter()


def warm(systems: dict[str, System], sample: list[np.ndarray]) -> None:
    """A forward and backward of each on a few short documents, not timed."""
    for name, system in systems.items():
        forward, divisor, _ = _padded(sample[:2], 64 + max(map(len, sample[:2])), "transformers" not in name)
        (forward(system.model) / divisor).backward()
        system.optimizer.zero_grad(set_to_none=True)


def check(figures: dict[str, dict[str, Any]], sample: list[np.ndarray]) -> None:
    """The run fails where a system lost documents or a loss is not finite."""
    expected = sum(map(len, sample))
    for name, found in figures.items():
        if not found["losses_finite"]:
            raise SystemExit(f"packing: a loss of '{name}' is not finite")
        if "to the batch" in name and found["real_tokens"] != expected:
            raise SystemExit(f"packing: '{name}' trained on {found['real_tokens']} of {expected} tokens")
