"""The logit of one token at each position: a row of the head's weight times a hidden state, no other row read."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain_lib.ops.output_head import OutputHead


def target_logits(hidden_TD: Tensor, head: OutputHead, target_ids_T: Tensor, index_N: Tensor) -> Tensor:
    """Differentiable logits of the targets at the positions ``index_N``.

    2 * N * D operations where the products of a head take 2 * N * D * V. They run in float32 at least, under autocast
    too: elementwise products gain nothing from half precision.

    Args:
        hidden_TD: [T, D], any float dtype. head: the output head. target_ids_T: int64 [T].
        index_N: int64 [N], distinct positions. N may be 0: the result still belongs to the graph.

    Returns:
        logits_N, float32 [N] (float64 for float64 inputs), differentiable in the hidden states, the head's weight and
        its adapter. With a sharded vocabulary every rank gets all of them, and a loss on them must be the same on
        every rank.
    """
    wide = torch.promote_types(torch.promote_types(hidden_TD.dtype, head.weight_VD.dtype), torch.float32)
    targets_N = target_ids_T.index_select(0, index_N) - head.first
    here_N = (targets_N >= 0) & (targets_N < head.local_vocab_size)
    rows_N = targets_N.where(here_N, 0)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        hidden_ND = head.spread(hidden_TD.index_select(0, index_N).to(wide))
        products = (hidden_ND * head.weight_VD.index_select(0, rows_N).to(wide)).sum(-1)
        if head.adapter is not None:
            low_NR = hidden_ND @ head.spread(head.adapter.down_RD).to(wide).t()
            up_NR = head.adapter.up_VR.index_select(0, rows_N).to(wide)
            products = products + (low_NR * up_NR).sum(-1) * head.adapter.scale
        if head.shard is not None:
            products = _Total.apply(products.where(here_N, 0), head.shard.group)
        logits = products * head.scale
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits


class _Total(torch.autograd.Function):
    """The sum over the ranks, on each of them; every rank's part gets the gradient of the sum, as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[N] -> [N]."""
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient itself."""
        return grad, None
