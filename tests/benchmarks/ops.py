"""Times of the tensor operations beside what they replace, in one run:

    python -m tests.benchmarks.ops --output tests/benchmarks/results/ops.json

Peers take turns within each round, so that a noisy neighbour hits all; minimum and median in ms are printed and, where
asked for, kept with the hardware, the threads and the load. ``OMP_NUM_THREADS`` sets the threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.attention_pieces import attend_pieces
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.output_head import OutputHead
from posttrain_lib.ops.reference import packed_attention_reference
from tests.benchmarks.recording import Recording, argument_parser

RESULTS: dict[str, dict[str, dict[str, float]]] = {}


def compare(title: str, peers: dict[str, Callable[[], object]], rounds: int) -> None:
    """Print and keep minimum and median of each peer; the first is ours, the others' ratios are to it."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    print(title)
    ours = next(iter(times.values()))
    RESULTS[title] = {
        name: {
            "min_ms": round(min(values), 2),
            "median_ms": round(sorted(values)[len(values) // 2], 2),
            "median_over_ours": round(sorted(values)[len(values) // 2] / sorted(ours)[len(ours) // 2], 2),
        }
        for name, values in times.items()
    }
    for name, values in times.items():
        print(f"  {name:28s} min {min(values):8.1f}   median {sorted(values)[len(values) // 2]:8.1f}")


def _lengths(tokens: int, mean: float, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = torch.empty(1).log_normal_(float(torch.tensor(mean).log()) - 0.25, 0.7, generator=generator)
        lengths.append(min(left, max(1, int(drawn))))
    return lengths


def attention(
    tokens: int,
    mean: float,
    heads: tuple[int, int],
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
) -> None:
    """Forward and backward, packed documents: ours, plain products in pieces, and one dense mask."""
    lengths = _lengths(tokens, mean)
    widths = (head_dim, head_dim, value_dim or head_dim)
    inputs = [
        torch.randn(tokens, count, width, dtype=dtype, requires_grad=True)
        for count, width in zip((heads[0], heads[1], heads[1]), widths, strict=True)
    ]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    logits = torch.randn(heads[0], dtype=dtype, requires_grad=True) if sinks else None
    options = {"scale": head_dim**-0.5, "softcap": softcap, "sinks_N": logits}

    def run(attend: Callable[..., Tensor]) -> None:
        attend(*inputs, cu_seqlens, max(lengths), **options).sum().backward()

    def products() -> None:
        attend_pieces(*inputs, lengths, lengths, window=None, **options).sum().backward()

    extras = [f"soft cap {softcap}"] * (softcap is not None) + ["sinks"] * sinks
    extras += [f"values of {value_dim}"] * (value_dim is not None) + [str(dtype).removeprefix("torch.")]
    compare(
        f"attention: {tokens} tokens, {len(lengths)} documents, {heads[0]}/{heads[1]} heads of {head_dim}, "
        + ", ".join(extras),
        {
            "per document": lambda: run(packed_attention),
            "products in pieces": products,
            "dense mask": lambda: run(packed_attention_reference),
        },
        rounds=5,
    )


def decoding(sequences: int, kept: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """One new token of each sequence: over the cache, and over everything again."""
    cache = KeyValueCache(sequences, kept + 1)
    shapes = [(count, head_dim) for count in (heads[0], heads[1], heads[1])]
    prompts = [torch.randn(sequences * kept, *shape, dtype=dtype) for shape in shapes]
    counts = [kept] * sequences
    cu_seqlens = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    cache.append(0, *prompts[1:], DocumentLayout.of(cu_seqlens, kept, cache=cache))
    cache.advance(counts)
    query, key, value = (torch.randn(sequences, *shape, dtype=dtype) for shape in shapes)
    single = DocumentLayout.of(torch.arange(sequences + 1, dtype=torch.int32), 1, cache=cache)

    def step() -> None:
        cache.append(0, key, value, single)
        cache.attend(0, query, single, scale=head_dim**-0.5)

    compare(
        f"decoding: {sequences} sequences of {kept} tokens, {heads[0]}/{heads[1]} heads of {head_dim}, "
        + str(dtype).removeprefix("torch."),
        {
            "cached": step,
            "uncached": lambda: packed_attention(*prompts, cu_seqlens, kept, scale=head_dim**-0.5),
        },
        rounds=9,
    )


def head(tokens: int, hidden_size: int, vocab: int, share: float, rounds: int) -> None:
    """Forward and backward of the loss: ours, full logits, and the three bare products on the supervised rows."""
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, hidden_size)).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    weights = (torch.rand(tokens) < share).float()
    index = weights.nonzero().squeeze(1)
    rows, grads = torch.randn(len(index), hidden_size), torch.randn(len(index), vocab)

    def naive() -> None:
        (cross_entropy(linear(hidden, weight), targets, reduction="none") * weights).sum().backward()

    def products() -> Sequence[Tensor]:
        plain = weight.detach()
        return rows @ plain.t(), grads @ plain, grads.t() @ rows

    compare(
        f"head: {tokens} tokens, hidden {hidden_size}, vocabulary {vocab}, {share:.0%} supervised",
        {
            "linear_cross_entropy": lambda: linear_cross_entropy(hidden, OutputHead(weight), targets, weights, index)[
                0
            ].backward(),
            "full logits": naive,
            "three bare products": products,
        },
        rounds,
    )


def norm(tokens: int, size: int) -> None:
    """Forward and backward: ours against the same operations under autograd."""
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.ones(size, requires_grad=True)

    def plain() -> None:
        (weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))).sum().backward()

    compare(
        f"norm: {tokens} x {size}",
        {"rms_norm": lambda: rms_norm(hidden, weight, 1e-6).sum().backward(), "under autograd": plain},
        rounds=15,
    )


def main() -> None:
    """All cases, a minute or two."""
    parser = argument_parser(__doc__)
    options = parser.parse_args()
    recording = Recording()
    print(f"threads {torch.get_num_threads()}, load {recording.load_at_start}")
    attention(4096, 100, (4, 2), 32)
    attention(4096, 256, (8, 4), 64)
    attention(1024, 256, (8, 4), 64, dtype=torch.bfloat16)
    attention(2048, 256, (8, 4), 64, sinks=True)
    attention(2048, 256, (8, 4), 64, softcap=50.0)
    attention(1024, 256, (8, 4), 64, dtype=torch.bfloat16, softcap=50.0)
    attention(2048, 256, (8, 8), 192, value_dim=128)
    decoding(16, 512, (8, 4), 64, torch.float32)
    decoding(16, 512, (8, 4), 64, torch.bfloat16)
    head(4096, 128, 512, 0.5, rounds=9)
    head(1024, 512, 32000, 1.0, rounds=3)
    head(1024, 512, 32000, 0.3, rounds=3)
    head(1024, 256, 151936, 0.5, rounds=3)
    norm(4096, 128)
    recording.write(options.output, {"cases": RESULTS})


if __name__ == "__main__":
    main()
