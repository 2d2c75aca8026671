"""Direct preference optimisation in one readable file: a pair at a time, full logits, plain gradient descent.

The model is ``sft_twin``'s. What it shares with the project is the file format alone: two Hugging Face folders go in,
policy and reference, and for each step its pairs as (prompt, chosen, rejected) token ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.sft_twin import logits_of

Ids = Sequence[int]
Pair = tuple[Ids, Ids, Ids]


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def answer_logprob(weights: dict[str, Tensor], config: dict, prompt: Ids, answer: Ids) -> Tensor:
    """log p(answer | prompt)."""
    tokens = torch.tensor([*prompt, *answer])
    logprobs = logits_of(weights, config, tokens).log_softmax(-1)
    return sum(logprobs[place - 1, tokens[place]] for place in range(len(prompt), len(tokens)))


def pair_loss(policy: dict[str, Tensor], reference: dict[str, Tensor], config: dict, pair: Pair, beta: float) -> Tensor:
    prompt, *answers = pair
    chosen, rejected = (
        answer_logprob(policy, config, prompt, answer) - answer_logprob(reference, config, prompt, answer)
        for answer in answers
    )
    return torch.log(1 + torch.exp(-beta * (chosen - rejected)))


def descend(
    weights: dict[str, Tensor], loss_of: Callable[[dict[str, Tensor]], Tensor], lr: float, clip_norm: float
) -> tuple[dict[str, Tensor], float]:
    """The weights after one step of gradient descent, and the loss before it."""
    for weight in weights.values():
        weight.requires_grad_()
    loss = loss_of(weights)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    norm = math.sqrt(sum(float((gradient * gradient).sum()) for gradient in gradients))
    scale = lr * min(1.0, clip_norm / (norm + 1e-6))
    updated = {
        name: (weight - scale * gradient).detach()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    return updated, float(loss.detach())


def train(
    policy_folder: Path,
    reference_folder: Path,
    steps: Sequence[Sequence[Pair]],
    *,
    beta: float,
    lr: float,
    clip_norm: float,
) -> list[float]:
    """The loss of each step, all in float64."""
    config = json.loads((policy_folder / "config.json").read_text())
    policy, reference = load(policy_folder), load(reference_folder)
    losses = []
    for pairs in steps:

        def loss_of(weights: dict[str, Tensor], pairs: Sequence[Pair] = pairs) -> Tensor:
            return sum(pair_loss(weights, reference, config, pair, beta) for pair in pairs) / len(pairs)

        policy, loss = descend(policy, loss_of, lr, clip_norm)
        losses.append(loss)
    return losses
