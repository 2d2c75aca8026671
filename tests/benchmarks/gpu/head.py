"""The head's loss, forward and backward, against the three bare products and against full logits.

Bare products are logits, gradient of the hidden states, gradient of the weight, of the supervised rows alone, with
nothing between them: once over all rows at a time, once in chunks of as many rows as the head's. Dense peers compute
all positions, as models do whose loss ignores labels of -100.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from posttrain_lib.ops.head_chunks import ChunkedHead
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs
from posttrain_lib.ops.output_head import OutputHead
from tests.benchmarks.gpu.common import (
    ROTATED,
    Cases,
    Part,
    ceilings,
    compiled,
    main,
    measure,
    peak_memory,
    ratio,
    relative_error,
    significant,
)

IGNORED = -100
#: most tokens that the compiled peer runs on
COMPILED = 4096


class Problem:
    """Random hidden states, a head and targets, some of them supervised; ``ROTATED`` sets of all but the weight."""

    def __init__(self, part: Part, tokens: int, hidden: int, vocabulary: int, share: float) -> None:
        device, dtype = part.device, part.dtype
        self.vocabulary = vocabulary
        self.weight = (0.02 * torch.randn(vocabulary, hidden, device=device)).to(dtype).requires_grad_()
        self.hidden = [torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_() for _ in range(ROTATED)]
        self.targets = [torch.randint(vocabulary, (tokens,), device=device) for _ in range(ROTATED)]
        self.count = max(1, round(share * tokens))
        self.index = torch.randperm(tokens, device=device)[: self.count].sort().values
        self.weights = torch.zeros(tokens, device=device).index_fill_(0, self.index, 1.0)
        self.labels = [
            torch.full_like(target, IGNORED).index_copy_(0, self.index, target[self.index]) for target in self.targets
        ]
        self.head = OutputHead(self.weight)
        self.chunk_rows = ChunkedHead(self.head, self.hidden[0], self.index, weight_gradient=True).chunk_rows

    def gradients(self, loss: Tensor, number: int) -> tuple[Tensor, ...]:
        """Of the hidden states and the weight."""
        return torch.autograd.grad(loss, [self.hidden[number % ROTATED], self.weight])

    def ours(self, number: int) -> tuple[Tensor, ...]:
        """This project's operation."""
        hidden, targets = self.hidden[number % ROTATED], self.targets[number % ROTATED]
        loss, _ = linear_cross_entropy(hidden, self.head, targets, self.weights, self.index)
        return loss.detach(), *self.gradients(loss, number)

    def logprobs(self, number: int) -> tuple[Tensor, ...]:
        """Log-probabilities that a loss goes on with: the logits are computed twice."""
        hidden, targets = self.hidden[number % ROTATED], self.targets[number % ROTATED]
        found, _ = token_logprobs(hidden, self.head, targets, self.index)
        return self.gradients(found.sum(), number)

    def dense(self, number: int, loss_of: Callable[..., Tensor] | None = None) -> tuple[Tensor, ...]:
        """Full logits, float32 as transformers makes them."""
        hidden, labels = self.hidden[number % ROTATED], self.labels[number % ROTATED]
        loss = (loss_of or dense_loss)(hidden, self.weight, labels)
        return loss.detach(), *self.gradients(loss, number)

    def products(self, rows_at_a_time: int, forwards: int = 1) -> Callable[[int], object]:
        """The bare products in the dtype of the inputs; ``forwards`` times the first one."""
        rows = [hidden.detach()[self.index] for hidden in self.hidden]
        weight = self.weight.detach()
        size = min(rows_at_a_time, self.count)
        logits = torch.empty(size, self.vocabulary, dtype=weight.dtype, device=weight.device)
        total, grads = torch.zeros_like(weight), torch.empty_like(rows[0])

        def run(number: int) -> None:
            here = rows[number % ROTATED]
            for start in range(0, self.count, size):
                chunk = here[start : start + size]
                buffer = logits[: len(chunk)]
                for _ in range(forwards):
                    torch.mm(chunk, weight.t(), out=buffer)
                torch.mm(buffer, weight, out=grads[start : start + size])
                if start == 0:
                    torch.mm(buffer.t(), chunk, out=total)
                else:
                    total.addmm_(buffer.t(), chunk)

        return run


def dense_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over the labels that are not ignored."""
    return cross_entropy(linear(hidden, weight).float(), labels, ignore_index=IGNORED, reduction="sum")


def other_losses(problem: Problem) -> dict[str, Callable[[int], object] | None]:
    """Peers that this machine may have."""
    found: dict[str, Callable[[int], object] | None] = {"liger": None, "cut_cross_entropy": None}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
        found["liger"] = lambda number: problem.dense(
            number, lambda hidden, weight, labels: liger(weight, hidden, labels)
        )
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut_cross_entropy"] = lambda number: problem.dense(
            number, lambda hidden, weight, labels: cut(hidden, weight, labels, reduction="sum")
        )
    return found


def loss_case(part: Part, tokens: int, hidden: int, vocabulary: int, share: float) -> Mapping[str, Any]:
    """Times, ratios and memory of one size."""
    problem = Problem(part, tokens, hidden, vocabulary, share)
    memory: dict[str, float | None] = {}
    for name, run in (("ours", problem.ours), ("dense", problem.dense)):
        try:
            run(0)
            with peak_memory(part.device) as peak:
                run(0)
            memory[name] = peak["gib"]
        except torch.OutOfMemoryError:
            memory[name] = None
    dense_compiled = compiled(dense_loss, part.device)
    peers: dict[str, Callable[[int], object] | None] = {
        "ours": problem.ours,
        "products, whole": problem.products(problem.count),
        "products, chunked": problem.products(problem.chunk_rows),
        "dense": problem.dense,
        "dense, compiled": lambda number: problem.dense(number, dense_compiled),
        **other_losses(problem),
    }
    # They compute all positions, whatever the labels say: no other time than with all of them. Compilation takes
    # seconds for every shape.
    left_out = {"dense", "dense, compiled"} if share < 1 else {"dense, compiled"} if tokens > COMPILED else set()
    peers = {name: run for name, run in peers.items() if name not in left_out}
    times = measure(part, peers)
    flops = 6.0 * problem.count * hidden * vocabulary
    # the gradients themselves: the weight's is a float32 sum where there are several chunks
    entry = 4 if problem.count > problem.chunk_rows else part.dtype.itemsize
    given = (tokens * hidden * part.dtype.itemsize + entry * vocabulary * hidden) / 2**30
    ours = times["ours"].get("median_ms")
    return {
        "tokens": tokens,
        "supervised": problem.count,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "chunk_rows": problem.chunk_rows,
        "times": times,
        "ours_over_products_whole": ratio(times, "ours", "products, whole"),
        "ours_over_products_chunked": ratio(times, "ours", "products, chunked"),
        "dense_over_ours": ratio(times, "dense", "ours"),
        "compiled_over_ours": ratio(times, "dense, compiled", "ours"),
        "ours_useful_tflops": None if ours is None else significant(flops / ours / 1e9),
        "peak_gib": memory,
        "gradients_gib": significant(given),
        "ours_beyond_gradients_gib": None if memory["ours"] is None else significant(memory["ours"] - given),
    }


def logprobs_case(part: Part, tokens: int, hidden: int, vocabulary: int) -> Mapping[str, Any]:
    """Four products, for losses that need log-probabilities first."""
    problem = Problem(part, tokens, hidden, vocabulary, 1.0)
    times = measure(
        part,
        {"ours": problem.logprobs, "products, chunked": problem.products(problem.chunk_rows, forwards=2)},
    )
    return {"times": times, "ours_over_products_chunked": ratio(times, "ours", "products, chunked")}


def error_case(part: Part) -> Mapping[str, Any]:
    """Errors against float64, and those of full logits in the same dtype beside them."""
    problem = Problem(part, 700, 256, 5003, 0.6)
    wide = [tensor.detach().double().requires_grad_() for tensor in (problem.hidden[0], problem.weight)]
    logits = linear(wide[0][problem.index], wide[1])
    loss = cross_entropy(logits, problem.targets[0][problem.index], reduction="sum")
    exact = (loss, *torch.autograd.grad(loss, wide))
    names = ("loss", "hidden", "weight")
    return {
        peer: {name: relative_error(*pair) for name, *pair in zip(names, found, exact, strict=True)}
        for peer, found in (("ours", problem.ours(0)), ("dense", problem.dense(0)))
    }


def cases(part: Part) -> Cases:
    """The most telling sizes first."""
    yield "ceilings", lambda: ceilings(part)
    yield "errors", lambda: error_case(part)
    sizes, widths = ((4096, 16384), [(4096, 128256), (1024, 151936)]) if part.full else ((96,), [(64, 1003)])
    for tokens in sizes:
        for hidden, vocabulary in widths:
            for share in (1.0, 0.3):
                size = (tokens, hidden, vocabulary, share)
                name = f"{tokens} tokens, {hidden} x {vocabulary}, {share:.0%} supervised"
                yield name, lambda size=size: loss_case(part, *size)
        if tokens == sizes[0]:
            yield f"log-probabilities, {tokens} tokens", lambda: logprobs_case(part, sizes[0], *widths[0])


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
