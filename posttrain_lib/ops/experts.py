"""A mixture of experts after its router: every token through the experts chosen for it, weighted and summed.

Token-expert pairs are sorted by expert once; each projection is then one product per expert that has tokens, over rows
that lie together, and every move of rows is a gather, forward and backward. So nothing is added up in an order that a
scheduler chooses: the same input gives the same bits on a CPU.

* CUDA, bfloat16, sizes that are multiples of 8: ``torch.nn.functional.grouped_mm`` where this torch has it, without
  reading anything back from the device.
* everything else: a loop over the experts. On a CUDA device it reads the experts' token counts back once a layer. On a
  CPU without kernels for half precision its products run in float32 and are rounded once.

Both stand behind :func:`grouped_linear`. The tests run the first on a CPU too, where torch has a slow twin of the
kernel; on a device the GPU suite covers it.

Where other ranks own some of the experts, an :class:`Exchange` stands between: rows go to the experts' owners before
the products and come back behind them.

E experts, K experts per token, P = T * K pairs of a token and an expert, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain_lib.errors import ModelError
from posttrain_lib.ops.attention import attention_dtype
from posttrain_lib.ops.head_chunks import cpu_has_products_in
from posttrain_lib.ops.local import local

#: rows and matrices must start at multiples of 16 bytes for the grouped kernel: 8 entries of bfloat16
_ALIGNED = 8
#: groups in one call of the grouped kernel
_MOST_GROUPS = 1023


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """``(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)`` with ``g = clamp(gate, max=limit)``, elementwise.

    The activation of gpt-oss, in the order of operations of transformers' GptOssExperts. Any shape, dtype kept.
    """
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * alpha))


@dataclass(frozen=True)
class ExpertAdapter:
    """A low-rank addition to one projection of every expert: ``scale * up @ down`` on top of its weight.

    down_ERI: [E, R, I] and up_EOR: [E, O, R] for a projection of I inputs and O outputs.
    """

    down_ERI: Tensor
    up_EOR: Tensor
    scale: float


@dataclass(frozen=True)
class ExpertGroups:
    """Token-expert pairs in the order of their experts, those of one expert in the order of the tokens.

    order_P   int64 [P]: the pair (token * K + choice) at each sorted place.
    place_P   int64 [P]: the sorted place of each pair; the inverse of ``order_P``.
    expert_P  int64 [P]: the expert at each sorted place.
    ends_E    int32 [E]: one past the last place of each expert.
    choices   K.
    """

    order_P: Tensor
    place_P: Tensor
    expert_P: Tensor
    ends_E: Tensor
    choices: int

    @classmethod
    def of(cls, expert_ids_TK: Tensor, experts: int) -> ExpertGroups:
        """Sort int64 ids [T, K].

        Raises:
            ModelError: an id outside ``[0, experts)``; not looked for on a CUDA device, where it would be a wait.
        """
        flat = expert_ids_TK.reshape(-1)
        expert_P, order_P = torch.sort(flat, stable=True)
        if not flat.is_cuda and flat.numel() and not 0 <= int(expert_P[0]) <= int(expert_P[-1]) < experts:
            raise ModelError(
                "a router chose an expert that does not exist",
                got=f"ids from {int(expert_P[0])} to {int(expert_P[-1])}",
                expected=f"0 to {experts - 1}",
                fix="the router's weight must have one row per expert",
            )
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
        ids = torch.arange(experts, device=flat.device, dtype=flat.dtype)
        ends_E = torch.searchsorted(expert_P, ids, right=True, out_int32=True)
        return cls(order_P, place_P, expert_P, ends_E, expert_ids_TK.shape[1])

    @cached_property
    def counts_E(self) -> Tensor:
        """int64 [E]: pairs of each expert."""
        return torch.diff(self.ends_E, prepend=self.ends_E.new_zeros(1)).long()

    @cached_property
    def token_P(self) -> Tensor:
        """int64 [P]: the token at each sorted place."""
        return self.order_P // self.choices

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        """(expert, its places) of the experts that have tokens. Reads the counts back from the device."""
        ends = self.ends_E.tolist()
        return [(i, slice(a, b)) for i, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]

    @cached_property
    def idle_E(self) -> Tensor:
        """bool [E]: experts without tokens."""
        return self.counts_E == 0


class Exchange(Protocol):
    """Rows on their way between the ranks that have the tokens and those that own the experts."""

    def to_owners(
        self, rows_PD: Tensor, groups: ExpertGroups
    ) -> tuple[Tensor, ExpertGroups, Callable[[Tensor], Tensor]]:
        """What lies between dispatch and products.

        Args:
            rows_PD: this rank's pairs in the order of all experts. groups: those pairs.

        Returns:
            (rows for the experts of this rank [Q, D] in the order of these, their groups, the way back: outputs [Q, O]
            -> [P, O] in the order of ``groups``). Both ways are differentiable.
        """


def mixture(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    activation: Callable[[Tensor, Tensor], Tensor],
    gate_bias_EF: Tensor | None = None,
    up_bias_EF: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    gate_adapter: ExpertAdapter | None = None,
    up_adapter: ExpertAdapter | None = None,
    down_adapter: ExpertAdapter | None = None,
    exchange: Exchange | None = None,
) -> Tensor:
    """For every token, the sum over its experts of ``weight * down(activation(gate(x), up(x)))``.

    Rounding is that of transformers' ``grouped_mm_experts_forward``: projections, bias and activation in the dtype of
    the computation, weighted outputs in the wider of that and the weights' dtype, their sum in float32 at least.

    Args:
        hidden_TD: [T, D].
        expert_ids_TK: int64 [T, K], the experts of each token. expert_weights_TK: [T, K], any float dtype.
        gate_EFD, up_EFD: [E, F, D]. down_EDF: [E, D, F]. As torch.nn.Linear keeps them, expert after expert.
        activation: elementwise, (gate, up) -> product.
        gate_bias_EF, up_bias_EF, down_bias_ED: per expert.
        gate_adapter, up_adapter, down_adapter: low-rank additions to the projections.
        exchange: where the experts' parameters are dealt out over ranks (sharded tensors of E experts, of which this
            rank has some); None: all are here.

    Returns:
        [T, D] in the dtype of the computation (autocast's where it is on). Differentiable once in every float tensor;
        an expert without tokens gets a gradient of zeros, so that ranks which hold other tokens still do the same.

    Raises:
        ModelError: an expert id that does not exist (where ids lie on the host).
    """
    dtype = attention_dtype(hidden_TD)
    groups = ExpertGroups.of(expert_ids_TK, gate_EFD.shape[0])
    with torch.autocast(hidden_TD.device.type, enabled=False):
        rows = _Dispatch.apply(hidden_TD.to(dtype), groups)
        own, back = groups, None
        if exchange is not None:
            rows, own, back = exchange.to_owners(rows, groups)
        gate = grouped_linear(rows, gate_EFD, own, bias_EO=gate_bias_EF, adapter=gate_adapter)
        up = grouped_linear(rows, up_EFD, own, bias_EO=up_bias_EF, adapter=up_adapter)
        rows = grouped_linear(activation(gate, up), down_EDF, own, bias_EO=down_bias_ED, adapter=down_adapter)
        return _Combine.apply(rows if back is None else back(rows), expert_weights_TK, groups)


def grouped_linear(
    rows_PI: Tensor,
    weight_EOI: Tensor,
    groups: ExpertGroups,
    *,
    bias_EO: Tensor | None = None,
    adapter: ExpertAdapter | None = None,
) -> Tensor:
    """Each row through the weight of its expert: [P, I] -> [P, O], rows in the order of ``groups``.

    Weights are brought to the rows' dtype; of sharded ones the rank's own experts are meant, which are those of
    ``groups``. The bias is added to the rounded product, as transformers does.
    """
    dtype = rows_PI.dtype
    bias = None if bias_EO is None else local(bias_EO).to(dtype)
    output = _GroupedLinear.apply(rows_PI, local(weight_EOI).to(dtype), bias, groups)
    if adapter is None:
        return output
    inner = _GroupedLinear.apply(rows_PI, local(adapter.down_ERI).to(dtype), None, groups)
    added = _GroupedLinear.apply(inner, local(adapter.up_EOR).to(dtype), None, groups)
    return torch.add(output, added, alpha=adapter.scale)


class _GroupedLinear(torch.autograd.Function):
    """One gradient tensor for all experts, written in place: indexing the weight per expert would have autograd build
    one of full size for each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, groups: ExpertGroups) -> Tensor:
        wants_rows, wants_weight, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if wants_weight else None, weight if wants_rows else None)
        ctx.groups = groups
        output = _products(rows, weight, groups)
        if bias is not None:
            output += bias.index_select(0, groups.expert_P)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad, groups = grad.contiguous(), ctx.groups
        grad_rows = None if weight is None else _products(grad, weight.transpose(1, 2), groups)
        grad_weight = None if rows is None else _outer_products(grad, rows, groups)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros((groups.ends_E.numel(), grad.shape[1]), dtype=wide)
            grad_bias = total.index_add_(0, groups.expert_P, grad.to(wide)).to(grad.dtype)
        return grad_rows, grad_weight, grad_bias, None


def _has_grouped_kernel(rows_PX: Tensor, sizes: tuple[int, ...], groups: ExpertGroups) -> bool:
    """Whether the grouped kernel takes rows and matrices of these sizes; nothing is read from the device."""
    return (
        rows_PX.is_cuda
        and rows_PX.dtype == torch.bfloat16
        and rows_PX.numel() > 0
        and not any(size % _ALIGNED for size in sizes)
        and groups.ends_E.numel() <= _MOST_GROUPS
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(rows_PX.device) >= (8, 0)
    )


def _products(rows_PI: Tensor, weight_EOI: Tensor, groups: ExpertGroups) -> Tensor:
    """[P, O]: each row times the transposed weight of its expert."""
    if _has_grouped_kernel(rows_PI, weight_EOI.shape[1:], groups):
        return _grouped_products(rows_PI, weight_EOI, groups)
    output = rows_PI.new_empty(rows_PI.shape[0], weight_EOI.shape[1])
    for expert, places in groups.slices:
        _product_into(output[places], rows_PI[places], weight_EOI[expert].t())
    return output


def _outer_products(grad_PO: Tensor, rows_PI: Tensor, groups: ExpertGroups) -> Tensor:
    """[E, O, I]: for each expert the sum over its rows of ``grad row^T``; zeros where it has none."""
    if _has_grouped_kernel(rows_PI, (grad_PO.shape[1], rows_PI.shape[1]), groups):
        return _grouped_outer_products(grad_PO, rows_PI, groups)
    output = rows_PI.new_empty(groups.ends_E.numel(), grad_PO.shape[1], rows_PI.shape[1])
    busy = dict(groups.slices)
    for expert, total in enumerate(output):
        if expert in busy:
            _product_into(total, grad_PO[busy[expert]].t(), rows_PI[busy[expert]])
        else:
            total.zero_()
    return output


def _product_into(output: Tensor, left: Tensor, right: Tensor) -> None:
    """``output = left @ right``; in float32 where this CPU would otherwise take a plain loop."""
    if output.is_cpu and not cpu_has_products_in(output.dtype):
        output.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out=output)


def _grouped_products(rows_PI: Tensor, weight_EOI: Tensor, groups: ExpertGroups) -> Tensor:
    """``_products`` in one kernel."""
    return torch.nn.functional.grouped_mm(rows_PI, weight_EOI.transpose(1, 2), offs=groups.ends_E)


def _grouped_outer_products(grad_PO: Tensor, rows_PI: Tensor, groups: ExpertGroups) -> Tensor:
    """``_outer_products`` in one kernel. What it leaves for a group without rows depends on the device (on Blackwell
    uninitialised memory was seen, pytorch issue 172439), so those are filled with zeros here."""
    output = torch.nn.functional.grouped_mm(grad_PO.t(), rows_PI, offs=groups.ends_E)
    return output.masked_fill_(groups.idle_E[:, None, None], 0)


class _Dispatch(torch.autograd.Function):
    """Every pair's copy of its token. Backward: a token's copies are gathered and added in float32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, groups: ExpertGroups) -> Tensor:
        ctx.groups = groups
        return hidden_TD.index_select(0, groups.token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        groups = ctx.groups
        copies = grad_PD.index_select(0, groups.place_P)
        return copies.unflatten(0, (-1, groups.choices)).sum(1), None  # torch adds half precision up in float32


class _Combine(torch.autograd.Function):
    """The weighted sum over each token's experts. Keeps the experts' outputs and the weights, not their products."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, weights_TK: Tensor, groups: ExpertGroups) -> Tensor:
        ctx.save_for_backward(rows_PD if ctx.needs_input_grad[1] else None, weights_TK)
        ctx.groups, ctx.dtype = groups, rows_PD.dtype
        outputs = rows_PD.index_select(0, groups.place_P).unflatten(0, (-1, groups.choices))
        return (outputs * weights_TK[..., None]).sum(1).to(rows_PD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        groups = ctx.groups
        scaled = grad_TD.index_select(0, groups.token_P) * weights.reshape(-1).index_select(0, groups.order_P)[:, None]
        if rows is None:
            return scaled.to(ctx.dtype), None, None
        wide = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
        outputs = rows.index_select(0, groups.place_P).unflatten(0, (-1, groups.choices))
        grad_weights = (outputs.to(wide) * grad_TD[:, None]).sum(-1)
        return scaled.to(ctx.dtype), grad_weights.to(weights.dtype), None
