"""The output head as data: what turns hidden states into logits, with everything that a family adds to a product.

An operation of the head (``ops.linear_cross_entropy``, ``ops.head_divergence``, ``ops.head_topk``) takes an
:class:`OutputHead` and never builds the full logits; :meth:`OutputHead.logits` does, for comparison and generation.

    logits = softcap * tanh(scale * hidden @ (weight + adapter.scale * up @ down)^T / softcap)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, pad

from posttrain_lib.errors import ModelError


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """A low-rank update of the head's weight, ``scale * up_VR @ down_RD``, never formed (LoRA, Hu et al. 2021).

    ``down_RD`` [R, D], ``up_VR`` [V, R]. With a sharded vocabulary ``up_VR`` has this rank's rows and ``down_RD`` is
    the same on every rank.
    """

    down_RD: Tensor
    up_VR: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """This rank's part of a head whose rows lie over the processes of ``group``, in the order of their ranks and in
    equal parts; ``first`` is the number of the first row here. Hidden states and targets are the same on every rank.
    """

    group: dist.ProcessGroup
    first: int


@dataclass(frozen=True, eq=False)
class OutputHead:
    """An output head.

    Args:
        weight_VD: [V, D]; with ``shard`` this rank's rows.
        vocab_size: entries of the whole vocabulary that exist; rows behind them are padding and have probability 0.
            None: all of them exist.
        scale: factor on the logits (Granite: ``1 / logits_scaling``).
        softcap: bound on the logits' size, applied after ``scale`` (Gemma-2's ``final_logit_softcapping``).
        adapter: low-rank update of the weight.
        shard: where the vocabulary is spread over processes.

    Raises:
        ModelError: the parts do not fit each other.
    """

    weight_VD: Tensor
    vocab_size: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: HeadAdapter | None = None
    shard: VocabularyShard | None = None

    def __post_init__(self) -> None:
        if self.vocab_size is not None and not 0 < self.vocab_size <= self.rows:
            raise ModelError(
                "vocab_size does not fit the output head",
                where="output head",
                got=f"vocab_size {self.vocab_size}",
                expected=f"1 to {self.rows}, the rows of the head's weight",
                fix="grow the head to the vocabulary, or correct vocab_size",
            )
        if self.local_vocab_size <= 0:
            raise ModelError(
                "a rank holds nothing but padding of the vocabulary",
                where=f"output head, rows from {self.first}",
                got=f"vocab_size {self.vocab_size}, {self.weight_VD.shape[0]} rows on each rank",
                expected="at least one entry on every rank",
                fix="pad the vocabulary less, or use a lower tensor-parallel degree",
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ModelError("softcap must be positive", where="output head", got=self.softcap, expected="> 0 or None")
        if self.adapter is not None:
            entries, size = self.weight_VD.shape
            down, up = self.adapter.down_RD.shape, self.adapter.up_VR.shape
            if down[1] != size or up[0] != entries or down[0] != up[1]:
                raise ModelError(
                    "the head's adapter does not fit its weight",
                    where="output head",
                    got=f"down {tuple(down)}, up {tuple(up)}",
                    expected=f"down (rank, {size}), up ({entries}, rank)",
                    fix="make the adapter for this head",
                )

    @property
    def rows(self) -> int:
        """Rows of the whole head, padding included."""
        here = self.weight_VD.shape[0]
        return here if self.shard is None else here * self.shard.group.size()

    @property
    def entries(self) -> int:
        """Entries of the whole vocabulary that exist."""
        return self.rows if self.vocab_size is None else self.vocab_size

    @property
    def first(self) -> int:
        """Number of the first row on this rank."""
        return 0 if self.shard is None else self.shard.first

    @property
    def local_vocab_size(self) -> int:
        """Entries that exist among this rank's rows."""
        return min(self.weight_VD.shape[0], self.entries - self.first)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> [T, rows], padding at -inf, differentiable; in the dtype of the product (autocast's where on).

        With ``shard`` every rank gets all columns; a loss on them must be the same on every rank, and its gradient in
        the hidden states and in ``adapter.down_RD`` is then whole on every rank.
        """
        logits = linear(self.spread(hidden_TD), self.weight_VD)
        if self.adapter is not None:
            low = linear(self.spread(hidden_TD), self.spread(self.adapter.down_RD))
            logits = logits + linear(low, self.adapter.up_VR) * self.adapter.scale
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.shard is not None:
            logits = _Collect.apply(logits, self.shard.group)
        if self.entries < self.rows:
            logits = pad(logits[:, : self.entries], (0, self.rows - self.entries), value=float("-inf"))
        return logits

    def spread(self, tensor: Tensor) -> Tensor:
        """The tensor, which every rank has, as it goes into work on this rank's rows: its gradient is the sum over the
        ranks. Itself where the vocabulary is whole."""
        return tensor if self.shard is None else _Spread.apply(tensor, self.shard.group)


class _Spread(torch.autograd.Function):
    """A tensor that every rank has goes into work on its own part: the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The tensor itself."""
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum over the group."""
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Collect(torch.autograd.Function):
    """Columns of all ranks, side by side on each; the gradient of a rank's columns is its own part of what comes."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[T, V/n] -> [T, V]."""
        ctx.here = slice(group.rank() * columns.shape[1], (group.rank() + 1) * columns.shape[1])
        parts = [torch.empty_like(columns, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, columns.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[T, V] -> [T, V/n]."""
        return grad[:, ctx.here], None
