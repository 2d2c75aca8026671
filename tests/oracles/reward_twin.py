"""Reward modelling in one readable file: an answer at a time, its score read at its last token, plain gradient descent.

The model is ``sft_twin``'s with a score head. What it shares with the project is the file format alone: a Hugging Face
folder of a sequence classification model of one label goes in, and for each step its pairs as token ids, the prompt in
both, with the margin that the chosen one is to lead by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.oracles.dpo_twin import Ids, descend, load
from tests.oracles.sft_twin import hidden_of

#: chosen, rejected, margin
Pair = tuple[Ids, Ids, float]


def score_of(weights: dict[str, Tensor], config: dict, document: Ids) -> Tensor:
    hidden = hidden_of(weights, config, torch.tensor(document))
    return weights["score.weight"][0] @ hidden[-1]


def pair_loss(weights: dict[str, Tensor], config: dict, pair: Pair, centre: float) -> Tensor:
    chosen, rejected = (score_of(weights, config, document) for document in pair[:2])
    lead = chosen - rejected - pair[2]
    return torch.log(1 + torch.exp(-lead)) + centre * (chosen + rejected) ** 2


def train(folder: Path, steps: Sequence[Sequence[Pair]], *, centre: float, lr: float, clip_norm: float) -> list[float]:
    """The loss of each step, all in float64."""
    config, weights = json.loads((folder / "config.json").read_text()), load(folder)
    losses = []
    for pairs in steps:

        def loss_of(weights: dict[str, Tensor], pairs: Sequence[Pair] = pairs) -> Tensor:
            return sum(pair_loss(weights, config, pair, centre) for pair in pairs) / len(pairs)

        weights, loss = descend(weights, loss_of, lr, clip_norm)
        losses.append(loss)
    return losses
