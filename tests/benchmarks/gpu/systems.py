"""Ways to train one model on the same documents: this project's step, and a plain loop over transformers' classes.

All hold float32 weights and compute under bfloat16 autocast, clip at the same norm and step the same fused AdamW over
the same groups. A step takes the same documents whatever lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain_lib.checkpoint.hf import stored_tensors
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.optim import build_optimizer
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.device import autocast
from posttrain_lib.training.train_step import StepSettings, train_step
from tests.benchmarks.gpu.documents import padded_batches

CLIP_NORM = 1.0
IGNORED = -100
ADAMW = SimpleNamespace(name="adamw", lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, options={})

#: one optimiser step: its mean loss
Step = Callable[[int], float]


def precision_on(device: torch.device) -> str:
    """The precision of the products."""
    return "bf16" if device.type == "cuda" else "fp32"


def own_model(spec: ModelSpec, device: torch.device) -> Decoder:
    """Random weights, drawn on the device: a model of a billion takes a CPU most of a minute."""
    model = build_model(spec, torch.float32, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        if spec.config.vocabulary_rows > spec.config.vocab_size:
            model.head_weight[spec.config.vocab_size :].zero_()
    return model


def own_step(model: Decoder, steps: Sequence[Sequence[PackedBatch]], device: torch.device) -> Step:
    """This project's training step over packed rows; ``steps`` take turns."""
    loss = SFTLoss()
    optimizer = build_optimizer(model, ADAMW)
    settings = StepSettings(rank_mesh(SINGLE, device), precision_on(device), CLIP_NORM, sources=1, name_example=str)

    def step(number: int) -> float:
        rows = steps[number % len(steps)]
        divisor = sum(loss.divisor(row) for row in rows)
        return train_step(model, loss, optimizer, rows, settings, global_divisor=divisor, step=number).loss

    return step


def peer_model(config: dict[str, Any], weights: dict[str, Tensor], attention: str, device: torch.device) -> nn.Module:
    """transformers' class with the given weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    built = AutoConfig.for_model(config["model_type"], **fields)
    built._attn_implementation = attention
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"the peer has other weights: without {missing}, and {unexpected} too many")
    return model.train()


def hf_weights(spec: ModelSpec, model: Decoder) -> dict[str, Tensor]:
    """Our weights under transformers' names, on the CPU."""
    return stored_tensors(spec, model.state_dict(), torch.float32)


def peer_step(
    model: nn.Module, steps: Sequence[Sequence[Callable[[], tuple[dict[str, Tensor], float]]]], device: torch.device
) -> Step:
    """A plain loop: forward with labels, backward of the mean over the step's targets, clip, AdamW.

    A micro-batch is made when its turn comes: (arguments of the model's forward, its targets).
    """
    optimizer = build_optimizer(model, ADAMW)

    def step(number: int) -> float:
        made = [make() for make in steps[number % len(steps)]]
        divisor = sum(count for _, count in made)
        total = torch.zeros((), device=device)
        for inputs, count in made:
            with autocast(device, precision_on(device)):
                loss = model(**inputs, use_cache=False).loss * (count / divisor)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def padded_micro_batches(
    documents: Sequence[np.ndarray], size: int, device: torch.device
) -> list[Callable[[], tuple[dict[str, Tensor], float]]]:
    """Batches of ``size`` documents, padded on the right to the longest of the batch."""

    def make(ids: np.ndarray, mask: np.ndarray) -> tuple[dict[str, Tensor], float]:
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return {**inputs, "labels": labels}, float(mask[:, 1:].sum())

    return [lambda pair=pair: make(*pair) for pair in padded_batches(documents, size)]


def packed_micro_batches(
    rows: Sequence[PackedBatch], device: torch.device
) -> list[Callable[[], tuple[dict[str, Tensor], float]]]:
    """Packed rows as transformers takes them: positions that start again tell it where documents begin."""

    def make(row: PackedBatch) -> tuple[dict[str, Tensor], float]:
        ids = torch.from_numpy(row.token_ids).long()
        # labels are shifted inside: place t holds what position t - 1 is to predict
        labels = torch.full_like(ids, IGNORED)
        places = torch.from_numpy(row.supervised_index) + 1
        labels[places] = ids[places]
        positions = torch.from_numpy(row.positions).long()
        inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {key: value[None].to(device) for key, value in inputs.items()}, float(len(places))

    return [lambda row=row: make(row) for row in rows]


def as_in_training(device: torch.device, deterministic: bool) -> Any:
    """The switches of a training run; without ``deterministic``, none of them."""
    from posttrain_lib.training.device import reproducible

    threads = None if device.type == "cuda" else torch.get_num_threads()
    return reproducible(0, threads) if deterministic else nullcontext()
