"""The head's three products at vocabularies as they are and padded: where odd sizes fall off the fast kernels.

Times are of each product alone: logits, gradient of the hidden states, gradient of the weight. The loss itself runs on
the vocabulary as it is and on the padded one, which must give the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from posttrain_lib.models.vocabulary import padded
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.ops.output_head import OutputHead
from tests.benchmarks.gpu.common import ROTATED, Cases, Part, ceilings, main, measure, significant

VOCABULARIES = (50257, 128257, 151669, 151936, 248077, 262145)
SMALL = (257, 320)
PADS = (1, 8, 64, 128, 256)
DEFAULT = 64
PRODUCTS = ("logits", "hidden", "weight")


def size_case(part: Part, vocabulary: int, tokens: int, hidden: int) -> Mapping[str, Any]:
    """All pads of one vocabulary, in turns."""
    rows = [torch.randn(tokens, hidden, device=part.device).to(part.dtype) for _ in range(ROTATED)]
    entries = sorted({padded(vocabulary, pad) for pad in PADS})
    peers: dict[str, Callable[[int], object]] = {}
    for size in entries:
        peers.update(_products(part, rows, size))
    times = measure(part, peers, rounds=7)
    totals = {size: [times[f"{product}, {size}"].get("median_ms") for product in PRODUCTS] for size in entries}
    sums = {size: sum(each) for size, each in totals.items() if None not in each}
    by_pad = {pad: sums.get(padded(vocabulary, pad)) for pad in PADS}
    known = {pad: total for pad, total in by_pad.items() if total is not None}
    best = min(known, key=lambda pad: known[pad]) if known else None
    return {
        "tokens": tokens,
        "hidden": hidden,
        "times": times,
        "total_ms_by_pad": {str(pad): None if total is None else significant(total) for pad, total in by_pad.items()},
        "best_pad": best,
        "default_over_best": _over(known, DEFAULT, best),
        "unpadded_over_default": _over(known, 1, DEFAULT),
    }


def _over(totals: Mapping[int, float], one: int, other: int | None) -> float | None:
    return significant(totals[one] / totals[other]) if one in totals and other in totals else None


def _products(part: Part, rows: list[torch.Tensor], size: int) -> dict[str, Callable[[int], object]]:
    """One weight and one buffer of logits of a size; memory is shared by nothing, for sizes take turns."""
    hidden = rows[0].shape[1]
    weight = (0.02 * torch.randn(size, hidden, device=part.device)).to(part.dtype)
    logits = torch.mm(rows[0], weight.t())
    grads, total = torch.empty_like(rows[0]), torch.empty_like(weight)
    return {
        f"logits, {size}": lambda number: torch.mm(rows[number % ROTATED], weight.t(), out=logits),
        f"hidden, {size}": lambda number: torch.mm(logits, weight, out=grads),
        f"weight, {size}": lambda number: torch.mm(logits.t(), rows[number % ROTATED], out=total),
    }


def loss_case(part: Part, vocabulary: int, tokens: int, hidden: int) -> Mapping[str, Any]:
    """The loss on the vocabulary as it is and padded: times, and the values' difference."""
    device = part.device
    rows = torch.randn(tokens, hidden, device=device).to(part.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    weights, index = torch.ones(tokens, device=device), torch.arange(tokens, device=device)
    bare = (0.02 * torch.randn(vocabulary, hidden, device=device)).to(part.dtype)
    losses: dict[str, float] = {}
    peers: dict[str, Callable[[int], object]] = {}
    for name, size in (("unpadded", vocabulary), ("padded", padded(vocabulary, DEFAULT))):
        weight = torch.zeros(size, hidden, dtype=bare.dtype, device=device)
        weight[:vocabulary] = bare
        weight.requires_grad_()

        def run(_: int, weight: torch.Tensor = weight) -> torch.Tensor:
            head = OutputHead(weight, vocab_size=vocabulary)
            loss, _values = linear_cross_entropy(rows, head, targets, weights, index)
            torch.autograd.grad(loss, [rows, weight])
            return loss.detach()

        losses[name], peers[name] = float(run(0)), run
    times = measure(part, peers, rounds=5)
    medians = [times[name].get("median_ms") for name in ("unpadded", "padded")]
    return {
        "times": times,
        "unpadded_over_padded": None if None in medians else significant(medians[0] / medians[1]),
        "losses": losses,
        "relative_difference": significant(abs(losses["padded"] - losses["unpadded"]) / abs(losses["unpadded"]), 2),
    }


def cases(part: Part) -> Cases:
    """Every vocabulary, then the loss on an odd one."""
    yield "ceilings", lambda: ceilings(part)
    tokens, hidden = (4096, 2048) if part.full else (64, 32)
    vocabularies = VOCABULARIES if part.full else SMALL
    for vocabulary in vocabularies:
        yield (
            f"products, vocabulary {vocabulary}",
            lambda vocabulary=vocabulary: size_case(part, vocabulary, tokens, hidden),
        )
    odd = 151669 if part.full else SMALL[0]
    yield f"loss, vocabulary {odd}", lambda: loss_case(part, odd, tokens, hidden)


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
