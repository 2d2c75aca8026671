"""Distillation from a live teacher in one readable file: a document at a time, both distributions whole.

Student and teacher are ``sft_twin``'s model. What it shares with the project is the file format alone: two Hugging Face
folders go in, and for each step the (token ids, loss weights) of its documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.oracles.dpo_twin import descend, load
from tests.oracles.sft_twin import Document, logits_of


def token_losses(student_SV: Tensor, teacher_SV: Tensor, tokens: Tensor, temperature: float, hard: float) -> Tensor:
    """[S - 1]: of each token but the first, ``(1 - hard) * temperature^2 * KL(teacher || student) + hard * nll``."""
    log_q = (student_SV[:-1] / temperature).log_softmax(-1)
    log_p = (teacher_SV[:-1] / temperature).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = -student_SV[:-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
    return (1 - hard) * temperature**2 * divergence + hard * nll


def train(
    student_folder: Path,
    teacher_folder: Path,
    steps: Sequence[Sequence[Document]],
    *,
    temperature: float,
    hard_weight: float,
    lr: float,
    clip_norm: float,
) -> list[float]:
    """The loss of each step, all in float64."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (student_folder, teacher_folder)]
    student, teacher = load(student_folder), load(teacher_folder)
    losses = []
    for documents in steps:

        def loss_of(weights: dict[str, Tensor], documents: Sequence[Document] = documents) -> Tensor:
            total, count = torch.zeros((), dtype=torch.float64), 0.0
            for token_ids, loss_weights in documents:
                tokens, weights_S = torch.tensor(token_ids), torch.tensor(loss_weights, dtype=torch.float64)
                own, others = logits_of(weights, configs[0], tokens), logits_of(teacher, configs[1], tokens)
                total = total + weights_S[1:] @ token_losses(own, others, tokens, temperature, hard_weight)
                count += float(weights_S[1:].sum())
            return total / count

        student, loss = descend(student, loss_of, lr, clip_norm)
        losses.append(loss)
    return losses
