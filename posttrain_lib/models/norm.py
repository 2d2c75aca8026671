"""The norm of every family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posttrain_lib.models.spec import NormConfig
from posttrain_lib.ops.local import local
from posttrain_lib.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, statistics in float32. ``eps``: where it is not the configuration's."""

    def __init__(self, size: int, config: NormConfig, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.config, self.eps = config, config.eps if eps is None else eps
        self.is_shared = False  # between ranks that each apply it to heads of their own

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and, without autocast, same dtype as ``hidden``."""
        kind = self.config
        weight = local(self.weight, partial=self.is_shared)
        return rms_norm(hidden, weight, self.eps, plus_one=kind.plus_one, late_cast=kind.late_cast)
