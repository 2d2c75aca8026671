"""The peers of the head's benchmark: torchtitan's chunked loss and TRL's, as their trainers call them.

TRL is of the project's environment, for tests; torchtitan is pinned in infra/locks/peers.txt, which says how to install
it into a folder of its own.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("torchtitan", "trl")
_IGNORED = -100

Run = Callable[[], Tensor]


def find_peers(folder: Path) -> dict[str, str]:
    """Version of each peer; ``folder`` joins the path, behind the project's own packages."""
    sys.path.append(str(folder))
    return {name: importlib.metadata.version(name) for name in NAMES}


def torchtitan_run(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, supervised_T: Tensor) -> Run:
    """``ChunkedLossWrapper`` at its default of 8 chunks: forward and backward, the loss returned."""
    from torchtitan.components.loss import ChunkedLossWrapper

    class Head(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, weight_VD)

    loss_of: Any = ChunkedLossWrapper.Config().build()
    loss_of.set_lm_head(Head())
    labels = targets_T.masked_fill(~supervised_T, _IGNORED)[None]
    count = supervised_T.sum()

    def run() -> Tensor:
        loss, _ = loss_of(hidden_TD[None], labels, count)
        loss.backward()
        return loss.detach()

    return run


def trl_run(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, supervised_T: Tensor) -> Run:
    """TRL's default SFT loss on a CPU (``trl.trainer.utils``, the fused head): every position is scored, in tiles of
    the width that its trainer uses."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    count = supervised_T.sum()

    def run() -> Tensor:
        logprobs, *_ = ChunkedLogProbFunction.apply(hidden_TD, weight_VD, None, targets_T, 1.0, WIDTH, None, 1.0, ())
        loss = -logprobs.masked_fill(~supervised_T, 0).sum() / count
        loss.backward()
        return loss.detach()

    return run


def clear(*tensors: Tensor) -> None:
    """Forget gradients, as an optimiser does between steps."""
    for tensor in tensors:
        tensor.grad = None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = torch.linalg.vector_norm(found.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))
