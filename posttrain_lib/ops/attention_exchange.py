"""Keys and values that lie on other ranks, where several ranks share a packed row's tokens.

Llama 3's context parallelism (Dubey et al. 2024, section 3.3.2) gathers all keys and values on every rank and scatters
their gradients back. Here only those rows travel that some query of the receiver sees, which the host knows beforehand:
of a long document what lies before a rank's last token of it, of one that no cut parts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class KeyExchange:
    """What one rank sends and receives in each layer, for one packed batch; made by ``parallel.context``.

    ``send_index`` int64 [S]: own tokens whose keys and values others need, by receiving rank, so that one may be there
    several times; numpy as made, a tensor in a batch of tensors. ``sent`` and ``received``: rows to and from each rank
    of ``group``, 0 for itself. ``travels``: whether any two ranks of the group exchange anything; the same on all of
    them, since they either all call each other or none does.
    """

    send_index: Any
    sent: tuple[int, ...]
    received: tuple[int, ...]
    travels: bool
    group: Any = None

    def map(self, convert: Callable[[Any], Any]) -> KeyExchange:
        """The same with ``convert`` applied to the array."""
        return replace(self, send_index=convert(self.send_index))

    def reversed(self, rows: Tensor) -> Tensor:
        """What the others give for the rows that they received, [R, W] -> [S, W]."""
        return self._all_to_all(rows, self.received, self.sent)

    def forth(self, rows: Tensor) -> Tensor:
        """The others' rows for what they need of this rank's, [S, W] -> [R, W]."""
        return self._all_to_all(rows, self.sent, self.received)

    def _all_to_all(self, rows: Tensor, out: tuple[int, ...], back: tuple[int, ...]) -> Tensor:
        got = rows.new_empty(sum(back), *rows.shape[1:])
        if self.travels:
            dist.all_to_all_single(got, rows.contiguous(), list(back), list(out), group=self.group)
        return got


def exchanged_keys(
    key_TKH: Tensor, value_TKV: Tensor, key_index: Tensor, exchange: KeyExchange
) -> tuple[Tensor, Tensor]:
    """([U, K, H], [U, K, V]): keys and values of the places ``key_index``, int64 [U], counted over this rank's tokens
    and then over those that it receives, by sending rank. All ranks of the group call it, and its backward, alike."""
    rows = torch.cat([key_TKH.flatten(1), value_TKV.flatten(1)], dim=1)  # one message for both
    key, value = _Exchanged.apply(rows, key_index, exchange).split([key_TKH[0].numel(), value_TKV[0].numel()], dim=1)
    return key.unflatten(1, key_TKH.shape[1:]), value.unflatten(1, value_TKV.shape[1:])


class _Exchanged(torch.autograd.Function):
    """Exchange and gather in one node: what the copies of a row get is added in float32 at least, on its own rank too,
    and what comes back from another rank was rounded once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, exchange: KeyExchange) -> Tensor:
        """[T, W], int64 [U] -> [U, W]."""
        ctx.save_for_backward(index, exchange.send_index)
        ctx.tokens, ctx.exchange = rows.shape[0], exchange
        got = exchange.forth(rows.index_select(0, exchange.send_index))
        return torch.cat([rows, got]).index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[U, W] -> [T, W]."""
        index, send_index = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        pool = grad.new_zeros((ctx.tokens + sum(ctx.exchange.received), *grad.shape[1:]), dtype=wide)
        pool.index_add_(0, index, grad.to(wide))
        back = ctx.exchange.reversed(pool[ctx.tokens :].to(grad.dtype))
        return pool[: ctx.tokens].index_add_(0, send_index, back.to(wide)).to(grad.dtype), None, None
