"""Norm, rotary embedding, activation, delta rule and experts, forward and backward: ours, plain and compiled.

"ours" is what a model calls, which on a GPU is a Triton kernel where there is one; "plain" the formula as transformers
writes it, under autograd; "compiled" the same through ``torch.compile``; "ours, compiled" this project's function
through it, which is torch's operations there. For what only moves memory, the least bytes (each input and each gradient
once) over the measured time stand beside the speed of a copy.

Dtypes and strides are those of a packed step: under autocast the stream between blocks is float32, and so are heads
behind a norm whose weight is; "of a wider projection" is a part of what one product made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.experts import mixture
from posttrain_lib.ops.gated_delta import gated_delta_rule
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.rope import apply_rope, rope_tables
from posttrain_lib.ops.swiglu import swiglu
from tests.benchmarks.gpu.common import (
    ROTATED,
    Cases,
    Part,
    boundaries,
    ceilings,
    compiled,
    document_lengths,
    main,
    measure,
    ratio,
    significant,
)

Function = Callable[..., Tensor]


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm's order of operations."""
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


def plain_rope(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """transformers' ``rotate_half`` with tables as wide as a head."""
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = (torch.cat((table, table), dim=-1).to(heads.dtype) for table in (cosine, sine))
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As a model writes it."""
    return silu(gate) * up


def compare(
    part: Part, inputs: list[list[Tensor]], fixed: list[Tensor], ours: Function, plain: Function, *, again: bool = True
) -> dict[str, Any]:
    """The four ways over rotated ``inputs``, which get gradients, and ``fixed`` ones, which do not.

    ``again``: whether the backward must read the inputs.
    """
    pulls = [torch.randn_like(plain(*inputs[0], *fixed))]

    def run(function: Function) -> Callable[[int], object]:
        def both(number: int) -> tuple[Tensor, ...]:
            values = inputs[number % ROTATED]
            return torch.autograd.grad(function(*values, *fixed), values, pulls[0])

        return both

    ways = {"ours": ours, "plain": plain}
    ways.update({"ours, compiled": compiled(ours, part.device), "compiled": compiled(plain, part.device)})
    times = measure(part, {name: run(function) for name, function in ways.items()})
    # forward reads the inputs and writes the output; backward reads inputs and the output's gradient, writes gradients
    moved = (3 if again else 2) * sum(value.nbytes for value in inputs[0]) + 2 * pulls[0].nbytes
    moved += 2 * sum(value.nbytes for value in fixed)
    speeds = {
        name: significant(moved / entry["median_ms"] / 1e6) for name, entry in times.items() if "median_ms" in entry
    }
    return {
        "times": times,
        "plain_over_ours": ratio(times, "plain", "ours"),
        "ours_over_compiled": ratio(times, "ours", "compiled"),
        "least_bytes": moved,
        "least_bytes_gb_per_s": speeds,
    }


def random(part: Part, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers that want a gradient; None: in the products' dtype."""
    return torch.randn(shape, device=part.device).to(part.dtype if dtype is None else dtype).requires_grad_()


def norm_case(part: Part, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Mapping[str, Any]:
    """RMS norm over the last dimension, its weight float32 as a step under autocast has it."""
    weight = {"dtype": torch.float32}
    inputs = [[random(part, *shape, dtype=dtype), random(part, shape[-1], **weight)] for _ in range(ROTATED)]
    return compare(part, inputs, [], lambda hidden, weight: rms_norm(hidden, weight, 1e-6), plain_norm)


def rope_case(
    part: Part, tokens: int, heads: int, size: int, *, dtype: torch.dtype | None = None, wider: int = 0
) -> Mapping[str, Any]:
    """Turning the heads of a row; they lie in a product that is ``wider`` by so many heads."""
    frequencies = 1e6 ** -(torch.arange(0, size, 2, device=part.device) / size)
    tables = rope_tables(torch.arange(tokens, device=part.device), frequencies)
    whole = [random(part, tokens, heads + wider, size, dtype=dtype) for _ in range(ROTATED)]
    inputs = [[heads_TNH.detach()[:, :heads].requires_grad_()] for heads_TNH in whole]
    return compare(part, inputs, list(tables), apply_rope, plain_rope, again=False)


def activation_case(part: Part, tokens: int, size: int) -> Mapping[str, Any]:
    """SwiGLU."""
    inputs = [[random(part, tokens, size), random(part, tokens, size)] for _ in range(ROTATED)]
    return compare(part, inputs, [], swiglu, plain_swiglu)


def delta_case(part: Part, tokens: int, mean: int, heads: int, size: int) -> Mapping[str, Any]:
    """The gated delta rule on a packed row, and transformers' chunked function on each document."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    lengths = document_lengths(tokens, mean, 8 * mean)
    bounds = boundaries(lengths, part.device)
    layout = DocumentLayout.of(bounds, max(lengths))
    wide = {"device": part.device, "dtype": torch.float32}
    rows = [random(part, tokens, heads, size) for _ in range(3)]
    rows += [(-torch.rand(tokens, heads, **wide)).requires_grad_(), torch.rand(tokens, heads, **wide).requires_grad_()]
    pull = torch.randn(tokens, heads, size, device=part.device).to(part.dtype)

    def ours(_: int) -> object:
        out, _state = gated_delta_rule(*rows, layout, scale=size**-0.5, normalise=True)
        return torch.autograd.grad(out, rows, pull)

    def each(_: int) -> object:
        parts = zip(*(row.split(lengths) for row in rows), strict=True)
        outs = [
            torch_chunk_gated_delta_rule(*(item[None] for item in part), use_qk_l2norm_in_kernel=True)[0]
            for part in parts
        ]
        return torch.autograd.grad(torch.cat(outs, 1)[0], rows, pull)

    times = measure(part, {"ours": ours, "transformers per document": each}, rounds=3)
    return {
        "documents": len(lengths),
        "times": times,
        "transformers_over_ours": ratio(times, "transformers per document", "ours"),
    }


def experts_case(part: Part, tokens: int, hidden: int, forward: int, count: int, choices: int) -> Mapping[str, Any]:
    """The mixture, transformers' two ways, and one dense product of as many FLOPs."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    device = part.device
    ids = torch.rand(tokens, count, device=device).topk(choices, 1).indices
    weights = torch.rand(tokens, choices, device=device).to(part.dtype)
    rows = random(part, tokens, hidden)
    shapes = [(count, forward, hidden), (count, forward, hidden), (count, hidden, forward)]
    with torch.no_grad():
        gate, up, down = (random(part, *shape).mul_(shape[-1] ** -0.5) for shape in shapes)
    trained = [tensor.requires_grad_() for tensor in (rows, gate, up, down)]
    pull = torch.randn_like(rows)

    def ours(_: int) -> object:
        return torch.autograd.grad(mixture(rows, ids, weights, *trained[1:], activation=swiglu), trained, pull)

    def theirs(implementation: str) -> Callable[[int], object]:
        sizes = {"num_experts": count, "hidden_size": hidden, "moe_intermediate_size": forward, "hidden_act": "silu"}
        built = Qwen3MoeExperts(SimpleNamespace(**sizes, _experts_implementation=implementation)).to(device, part.dtype)
        built.gate_up_proj.data, built.down_proj.data = torch.cat((gate, up), 1).detach(), down.detach()
        given = [rows, *built.parameters()]
        return lambda _: torch.autograd.grad(built(rows, ids, weights), given, pull)

    left, right = random(part, tokens * choices, hidden).detach(), random(part, hidden, 3 * forward).detach()
    whole = torch.empty(tokens * choices, 3 * forward, dtype=part.dtype, device=device)

    def dense(_: int) -> None:
        for _product in range(3):  # a forward and two backwards
            torch.mm(left, right, out=whole)

    times = measure(
        part,
        {
            "ours": ours,
            "dense products of as many FLOPs": dense,
            "transformers grouped_mm": theirs("grouped_mm"),
            "transformers eager": theirs("eager"),
        },
        rounds=5,
    )
    return {
        "times": times,
        "ours_over_dense_products": ratio(times, "ours", "dense products of as many FLOPs"),
        "grouped_over_ours": ratio(times, "transformers grouped_mm", "ours"),
        "eager_over_ours": ratio(times, "transformers eager", "ours"),
    }


def cases(part: Part) -> Cases:
    """What every layer has first."""
    yield "ceilings", lambda: ceilings(part)
    tokens = 16384 if part.full else 64
    hidden, heads, size, forward = (2048, 16, 128, 6144) if part.full else (32, 2, 16, 48)
    stream, row = torch.float32, f"{tokens} x {heads} x {size}"
    yield f"rms_norm of the float32 stream, {tokens} x {hidden}", lambda: norm_case(part, (tokens, hidden), stream)
    yield f"rms_norm per head, {row}", lambda: norm_case(part, (tokens, heads, size))
    yield f"rope of float32 heads, {row}", lambda: rope_case(part, tokens, heads, size, dtype=stream)
    yield f"rope of a wider projection, {row}", lambda: rope_case(part, tokens, heads, size, wider=heads)
    yield f"swiglu, {tokens} x {forward}", lambda: activation_case(part, tokens, forward)
    experts = (16384, 2048, 768, 128, 8) if part.full else (32, 16, 24, 4, 2)
    yield "experts: {} tokens, {} x {}, {} of which {}".format(*experts), lambda: experts_case(part, *experts)
    delta = (8192, 487, 16, 128) if part.full else (128, 20, 2, 16)
    yield (
        "gated delta rule: {} tokens, documents of {}, {} heads of {}".format(*delta),
        lambda: delta_case(part, *delta),
    )


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
