"""Attention over packed documents, forward and backward: ours, and other ways to keep documents apart.

The bar is ``varlen_attn`` itself on documents of one length, with as many tokens and as many query-key pairs: time per
useful FLOP against its own. Soft caps and sinks go through FlexAttention, which must not compile again because the
documents are others. FlexAttention has no backward on a CPU: there it runs forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from posttrain_lib.ops.attention import DocumentLayout, has_fused_varlen, packed_attention
from posttrain_lib.ops.attention_flex import attend_flex, block_mask
from posttrain_lib.ops.reference import packed_attention_reference
from tests.benchmarks.gpu.common import (
    ROTATED,
    Cases,
    Part,
    boundaries,
    ceilings,
    document_lengths,
    main,
    measure,
    peak_memory,
    ratio,
    relative_error,
    significant,
)

SOFTCAP = 50.0
#: mean of the documents -> the longest
MEANS = {487: 4096, 1024: 4096}
#: (query heads, key heads, head dim) of Qwen3-0.6B and Llama-3.2-1B
HEADS = {"Qwen3-0.6B": (16, 8, 128), "Llama-3.2-1B": (32, 8, 64)}


class Row:
    """A packed row: rotated queries, keys and values, and its documents."""

    def __init__(self, part: Part, lengths: list[int], heads: tuple[int, int, int]) -> None:
        self.part, self.lengths, self.size = part, lengths, heads[2]
        self.tokens, self.longest = sum(lengths), max(lengths)
        shapes = [(self.tokens, count, self.size) for count in (heads[0], heads[1], heads[1])]
        self.inputs = [
            [torch.randn(shape, device=part.device).to(part.dtype).requires_grad_() for shape in shapes]
            for _ in range(ROTATED)
        ]
        self.pull = torch.randn(shapes[0], device=part.device).to(part.dtype)
        self.sinks = torch.randn(heads[0], device=part.device).to(part.dtype).requires_grad_()
        self.bounds = boundaries(lengths, part.device)
        self.scale = self.size**-0.5
        pairs = sum(length**2 / 2 for length in lengths)
        self.flops = 12.0 * heads[0] * self.size * pairs

    def layout(self) -> DocumentLayout:
        """As a model's forward makes it."""
        fused = has_fused_varlen(self.part.device, self.part.dtype)
        return DocumentLayout.of(self.bounds, self.longest, fused=fused)

    def both(self, attend: Callable[..., Tensor], sinks: bool = False) -> Callable[[int], tuple[Tensor, ...]]:
        """Forward and backward of ``attend(query, key, value)``."""
        more = [self.sinks] if sinks else []

        def run(number: int) -> tuple[Tensor, ...]:
            inputs = self.inputs[number % ROTATED]
            output = attend(*inputs)
            return output.detach(), *torch.autograd.grad(output, [*inputs, *more], self.pull)

        return run

    def ours(self, softcap: float | None = None, sinks: bool = False) -> Callable[[int], tuple[Tensor, ...]]:
        """This project's operation, the layout made each time."""
        options = {"scale": self.scale, "softcap": softcap, "sinks_N": self.sinks if sinks else None}
        return self.both(lambda *rows: packed_attention(*rows, self.layout(), self.longest, **options), sinks)

    def each(self) -> Callable[[int], tuple[Tensor, ...]]:
        """SDPA on one document after another."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(*(rows.split(self.lengths) for rows in (query, key, value)), strict=True)
            return torch.cat([self._sdpa(*part, mask=None) for part in parts])

        return self.both(attend)

    def masked(self) -> Callable[[int], tuple[Tensor, ...]]:
        """SDPA with a table of all pairs, made once."""
        numbers = torch.repeat_interleave(torch.tensor(self.lengths, device=self.part.device))
        mask = (numbers[:, None] == numbers[None, :]).tril_()
        return self.both(lambda query, key, value: self._sdpa(query, key, value, mask))

    def flex(self) -> Callable[[int], object]:
        """FlexAttention with the table of blocks that ours makes for soft caps and sinks."""
        attend = None if self.part.full else flex_attention

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            blocks = block_mask(self.bounds, self.bounds, self.tokens, self.tokens, None)
            return attend_flex(query, key, value, blocks, scale=self.scale, softcap=None, sinks_N=None, attend=attend)

        if self.part.full:
            return self.both(forward)

        def run(number: int) -> Tensor:
            return forward(*(rows.detach() for rows in self.inputs[number % ROTATED]))

        return run

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        heads = [rows.transpose(0, 1)[None] for rows in (query, key, value)]
        options = {"attn_mask": mask, "is_causal": mask is None, "scale": self.scale}
        out = scaled_dot_product_attention(*heads, **options, enable_gqa=query.shape[1] != key.shape[1])
        return out[0].transpose(0, 1)


def even_lengths(lengths: list[int]) -> list[int]:
    """Documents of one length with about as many tokens and pairs as these."""
    length = round(sum(length**2 for length in lengths) / sum(lengths))
    return [length] * max(1, round(sum(lengths) / length))


def plain_case(
    part: Part, tokens: int, mean: int, longest: int, heads: tuple[int, int, int], *, with_flex: bool
) -> Mapping[str, Any]:
    """Without soft cap or sinks. ``with_flex``: FlexAttention compiles for seconds for every size of a head."""
    lengths = document_lengths(tokens, mean, longest)
    row, even = Row(part, lengths, heads), Row(part, even_lengths(lengths), heads)
    times = measure(
        part,
        {
            "ours": row.ours(),
            "ours, even documents": even.ours(),
            "sdpa per document": row.each(),
            **({"flex": row.flex()} if with_flex else {}),
            "sdpa, dense mask": row.masked(),
        },
    )
    per_flop = None
    if "median_ms" in times["ours"] and "median_ms" in times["ours, even documents"]:
        per_flop = significant(
            times["ours"]["median_ms"] / row.flops / (times["ours, even documents"]["median_ms"] / even.flops)
        )
    ours = times["ours"].get("median_ms")
    with peak_memory(part.device) as peak:
        row.ours()(0)
    return {
        "documents": len(lengths),
        "longest": max(lengths),
        "even_documents": {"length": even.longest, "count": len(even.lengths)},
        "times": times,
        "time_per_useful_flop_over_even": per_flop,
        "ours_useful_tflops": None if ours is None else significant(row.flops / ours / 1e9),
        "even_useful_tflops": None
        if "median_ms" not in times["ours, even documents"]
        else significant(even.flops / times["ours, even documents"]["median_ms"] / 1e9),
        "per_document_over_ours": ratio(times, "sdpa per document", "ours"),
        "dense_mask_over_ours": ratio(times, "sdpa, dense mask", "ours"),
        "flex_over_ours": ratio(times, "flex", "ours"),
        "ours_peak_gib": peak["gib"],
    }


def special_case(part: Part, tokens: int, mean: int, softcap: float | None, sinks: bool) -> Mapping[str, Any]:
    """Soft cap or sinks: time, error, and graphs that other documents make."""
    heads = HEADS["Qwen3-0.6B"] if part.full else (2, 1, 16)
    row = Row(part, document_lengths(tokens, mean, 4 * mean), heads)
    times = measure(part, {"special": row.ours(softcap, sinks), "plain": row.ours()}, rounds=5)
    mask_ms = measure(
        part, {"table": lambda _: block_mask(row.bounds, row.bounds, row.tokens, row.tokens, None)}, rounds=3
    )["table"]
    before = _graphs()
    for seed in range(1, 7):
        lengths = document_lengths(tokens - 3 * seed, mean, 4 * mean, seed)
        Row(part, lengths, heads).ours(softcap, sinks)(0)
    return {
        "times": times,
        "special_over_plain": ratio(times, "special", "plain"),
        "table_of_blocks": mask_ms,
        "graphs_of_6_other_rows": _graphs() - before,
        "errors": _errors(part, heads, softcap, sinks),
    }


def _errors(part: Part, heads: tuple[int, int, int], softcap: float | None, sinks: bool) -> dict[str, float]:
    """Against the readable version in float64, on a short row."""
    row = Row(part, [130, 5, 64, 313], heads)
    found = row.ours(softcap, sinks)(0)
    inputs = [rows.detach().double().requires_grad_() for rows in (*row.inputs[0], row.sinks)]
    options = {"scale": row.scale, "softcap": softcap, "sinks_N": inputs[3] if sinks else None}
    output = packed_attention_reference(*inputs[:3], row.bounds, row.longest, **options)
    wanted = inputs if sinks else inputs[:3]
    exact = (output, *torch.autograd.grad(output, wanted, row.pull.double()))
    names = ("output", "query", "key", "value", "sinks")
    return {name: relative_error(*pair) for name, *pair in zip(names, found, exact, strict=False)}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def cases(part: Part) -> Cases:
    """The plain path first."""
    yield "ceilings", lambda: ceilings(part)
    tokens = 16384 if part.full else 512
    means = MEANS if part.full else {40: 160}
    named = HEADS if part.full else {"small": (2, 1, 16)}
    for number, (name, heads) in enumerate(named.items()):
        for mean, longest in means.items():
            size = (part, tokens, mean, longest, heads)
            flex = number == 0
            yield f"{name}, documents of {mean}", lambda size=size, flex=flex: plain_case(*size, with_flex=flex)
    mean = next(iter(means))
    for name, softcap, sinks in (("sinks", None, True), ("soft cap", SOFTCAP, False)):
        yield name, lambda softcap=softcap, sinks=sinks: special_case(part, tokens, mean, softcap, sinks)


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
