"""Supervised fine-tuning of a Qwen3 model in one readable file: no packing, no chunks, no sharding, no optimiser class.

What it shares with the project is the file formats alone: a Hugging Face folder goes in, and for each step the list
of (token ids, loss weights) of its documents. It must give the losses that the project's training gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

Document = tuple[Sequence[int], Sequence[float]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [S, heads, H]: entry i turns with entry i + H/2 by position * theta^(-2i/H)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def hidden_of(weights: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """What the head is given, [S, D], of one document."""
    heads, shared, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    length = len(tokens)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
        h = rms_norm(x, w["input_layernorm.weight"], eps)
        q = (h @ w["self_attn.q_proj.weight"].T).view(length, heads, size)
        k = (h @ w["self_attn.k_proj.weight"].T).view(length, shared, size)
        v = (h @ w["self_attn.v_proj.weight"].T).view(length, shared, size)
        q = rotate(rms_norm(q, w["self_attn.q_norm.weight"], eps), theta)
        k = rotate(rms_norm(k, w["self_attn.k_norm.weight"], eps), theta)
        k, v = (t.repeat_interleave(heads // shared, dim=1) for t in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(size)
        mixed = torch.einsum("nqk,knh->qnh", scores.masked_fill(future, -math.inf).softmax(-1), v)
        x = x + mixed.reshape(length, -1) @ w["self_attn.o_proj.weight"].T
        h = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gated = silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + gated @ w["mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"], eps)


def logits_of(weights: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """Logits [S, V] of one document; the head is tied."""
    return hidden_of(weights, config, tokens) @ weights["model.embed_tokens.weight"].T


def step_loss(weights: dict[str, Tensor], config: dict, documents: Sequence[Document]) -> Tensor:
    """Weighted mean negative log-likelihood over all trained tokens of a step."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for token_ids, loss_weights in documents:
        tokens, w = torch.tensor(token_ids), torch.tensor(loss_weights, dtype=torch.float64)
        logprobs = logits_of(weights, config, tokens).log_softmax(-1)
        for position in range(1, len(tokens)):
            total = total - w[position] * logprobs[position - 1, tokens[position]]
            count += float(w[position])
    return total / count


def learning_rate(step: int, steps: int, peak: float, warmup: int, min_ratio: float) -> float:
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2)


def train(
    folder: Path,
    batches: Sequence[Sequence[Document]],
    *,
    steps: int,
    lr: float,
    warmup: int,
    min_ratio: float,
    weight_decay: float,
    clip_norm: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[float]:
    """Losses of the first ``len(batches)`` of ``steps`` AdamW steps, all in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.double().requires_grad_() for k, v in load_file(folder / "model.safetensors").items()}
    first = {k: torch.zeros_like(v) for k, v in weights.items()}
    second = {k: torch.zeros_like(v) for k, v in weights.items()}
    losses = []
    for step, documents in enumerate(batches, start=1):
        loss = step_loss(weights, config, documents)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        rate = learning_rate(step, steps, lr, warmup, min_ratio)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, clip_norm / (norm + 1e-6))
                first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
                second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
                if weight.ndim > 1:
                    weight *= 1 - rate * weight_decay
                direction = first[name] / (1 - betas[0] ** step)
                weight -= rate * direction / ((second[name] / (1 - betas[1] ** step)).sqrt() + eps)
        losses.append(float(loss.detach()))
    return losses
