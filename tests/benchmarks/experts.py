"""Times of the mixture of experts, the gated delta rule and the short convolution beside transformers, in one run:

    python -m tests.benchmarks.experts --output tests/benchmarks/results/experts.json

Forward and backward. Peers take turns within each round; minimum and median in ms are printed and, where asked for,
kept with the hardware, the threads and the load. ``OMP_NUM_THREADS`` sets the threads.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.experts import mixture
from posttrain_lib.ops.gated_delta import gated_delta_rule
from posttrain_lib.ops.short_convolution import short_convolution
from posttrain_lib.ops.swiglu import swiglu
from tests.benchmarks.ops import RESULTS, compare
from tests.benchmarks.recording import Recording, argument_parser


def _layout(lengths: list[int]) -> DocumentLayout:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return DocumentLayout.of(bounds, max(lengths))


def _lengths(tokens: int, mean: int) -> list[int]:
    """Documents between half and one and a half times the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(torch.randint(mean // 2, mean * 3 // 2, (1,), generator=generator))
        lengths.append(min(left, drawn))
    return lengths


def experts(tokens: int, hidden: int, forward: int, count: int, choices: int, dtype: torch.dtype, rounds: int) -> None:
    """Ours against both of transformers' ways, from the same weights."""
    ids = torch.rand(tokens, count).argsort(1)[:, :choices]
    weights = torch.rand(tokens, choices).to(dtype)
    rows = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    shapes = [(count, forward, hidden), (count, forward, hidden), (count, hidden, forward)]
    gate, up, down = (torch.randn(shape).mul_(shape[-1] ** -0.5).to(dtype).requires_grad_() for shape in shapes)

    def theirs(implementation: str) -> Qwen3MoeExperts:
        sizes = {"num_experts": count, "hidden_size": hidden, "moe_intermediate_size": forward, "hidden_act": "silu"}
        built = Qwen3MoeExperts(SimpleNamespace(**sizes, _experts_implementation=implementation)).to(dtype)
        built.gate_up_proj.data, built.down_proj.data = torch.cat((gate, up), 1).detach(), down.detach()
        return built

    eager, grouped = theirs("eager"), theirs("grouped_mm")
    compare(
        f"experts: {tokens} tokens, {choices} of {count} experts, {hidden} x {forward}, {dtype}",
        {
            "mixture": lambda: mixture(rows, ids, weights, gate, up, down, activation=swiglu).sum().backward(),
            "transformers grouped_mm": lambda: grouped(rows, ids, weights).sum().backward(),
            "transformers eager": lambda: eager(rows, ids, weights).sum().backward(),
        },
        rounds,
    )


def gated_delta(tokens: int, mean: int, heads: int, size: int, rounds: int) -> None:
    """Ours on a packed row against transformers' chunked function on each document."""
    lengths = _lengths(tokens, mean)
    layout = _layout(lengths)
    query, key, value = (torch.randn(tokens, heads, size, requires_grad=True) for _ in range(3))
    decay = (-torch.rand(tokens, heads)).requires_grad_()
    beta = torch.rand(tokens, heads).requires_grad_()
    inputs = (query, key, value, decay, beta)

    def ours() -> None:
        gated_delta_rule(*inputs, layout, scale=size**-0.5, normalise=True)[0].sum().backward()

    def each() -> None:
        parts = zip(*(item.split(lengths) for item in inputs), strict=True)
        outs = [
            torch_chunk_gated_delta_rule(*(item[None] for item in part), use_qk_l2norm_in_kernel=True)[0]
            for part in parts
        ]
        torch.cat(outs, 1).sum().backward()

    title = f"gated delta rule: {tokens} tokens, {len(lengths)} documents, {heads} heads of {size}"
    compare(title, {"gated_delta_rule": ours, "transformers per document": each}, rounds)


def convolution(tokens: int, mean: int, channels: int, dtype: torch.dtype, rounds: int) -> None:
    """Ours on a packed row against torch's convolution on each document, and on the row as if it were one document."""
    lengths = _lengths(tokens, mean)
    layout = _layout(lengths)
    rows = torch.randn(tokens, channels).to(dtype).requires_grad_()
    weight = torch.randn(channels, 4).to(dtype).requires_grad_()

    def convolve(part: Tensor) -> Tensor:
        padded = conv1d(part.t()[None], weight[:, None], padding=3, groups=channels)
        return silu(padded[0, :, : len(part)]).t()

    compare(
        f"short convolution: {tokens} tokens, {len(lengths)} documents, {channels} channels, {dtype}",
        {
            "short_convolution": lambda: short_convolution(rows, weight, layout, activation="silu")[0].sum().backward(),
            "conv1d per document": lambda: torch.cat([convolve(p) for p in rows.split(lengths)]).sum().backward(),
            "conv1d, documents mixed up": lambda: convolve(rows).sum().backward(),
        },
        rounds,
    )


def main() -> None:
    """All cases, a minute or two."""
    parser = argument_parser(__doc__)
    options = parser.parse_args()
    recording = Recording()
    print(f"threads {torch.get_num_threads()}, load {recording.load_at_start}")
    experts(1024, 256, 128, 16, 4, torch.float32, rounds=5)
    experts(256, 256, 128, 16, 4, torch.bfloat16, rounds=5)
    gated_delta(2048, 200, 4, 64, rounds=5)
    gated_delta(2048, 1000, 4, 64, rounds=5)
    convolution(2048, 200, 512, torch.float32, rounds=5)
    convolution(2048, 200, 512, torch.bfloat16, rounds=5)
    recording.write(options.output, {"cases": RESULTS})


if __name__ == "__main__":
    main()
