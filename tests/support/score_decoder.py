"""A decoder whose head has one row, a score, as reward losses want it."""

from __future__ import annotations

import torch
from torch import nn

from posttrain_lib.losses.contract import tiny_decoder
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.ops.output_head import OutputHead


class ScoreDecoder(Decoder):
    """The head is one row, whatever the vocabulary."""

    @property
    def output_head(self) -> OutputHead:
        return OutputHead(self.lm_head.weight)


def score_decoder(seed: int = 0) -> ScoreDecoder:
    """Of random weights in float64."""
    model = tiny_decoder(seed)
    model.__class__ = ScoreDecoder
    model.lm_head = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model
