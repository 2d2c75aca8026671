"""The head's loss, forward and backward, beside torchtitan's and TRL's chunked losses on a CPU, in one run:

    ./infra/env pip install --no-deps --target FOLDER -r infra/locks/peers.txt
    ./infra/env python -m tests.benchmarks.head --peers FOLDER --output tests/benchmarks/results/head.json

1024 positions of width 512, a vocabulary of 151,936, 30 % of the positions supervised. Peers take turns within each of
five rounds; medians count. The processor's seconds stand beside the clock's, which neighbours lengthen. Before the
clock starts, each peer's loss and gradients are compared with ours.

Where the CPU has no half-precision products, torch computes the peers' bfloat16 ones in a plain loop, which takes
minutes at this size. The full-size bfloat16 case therefore gives the peers float32 copies of the same numbers, made
outside of the clock; what their bfloat16 takes is a case of its own, at a small vocabulary.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.ops.head_chunks import cpu_has_products_in
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.ops.output_head import OutputHead
from tests.benchmarks.head_peers import clear, find_peers, relative_error, torchtitan_run, trl_run
from tests.benchmarks.recording import Recording, argument_parser, load

POSITIONS, WIDTH, VOCABULARY, SUPERVISED = 1024, 512, 151936, 0.3
SMALL_VOCABULARY = 4096


def measure(vocabulary: int, ours: torch.dtype, peers: torch.dtype, rounds: int) -> dict[str, Any]:
    """One case: seconds of each, and what the peers' medians are to ours."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(ours)
    weight = (0.05 * torch.randn(vocabulary, WIDTH, generator=generator)).to(ours)
    targets = torch.randint(vocabulary, (POSITIONS,), generator=generator)
    supervised = torch.rand(POSITIONS, generator=generator) < SUPERVISED
    index, weights = supervised.nonzero().squeeze(1), supervised.float()
    mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    theirs = [tensor.to(peers, copy=True).requires_grad_() for tensor in (hidden, weight)]
    rows, grads = hidden[index].float(), torch.rand(len(index), vocabulary)
    wide = weight.float()

    def head() -> Tensor:
        loss, _ = linear_cross_entropy(mine[0], OutputHead(mine[1]), targets, weights, index)
        loss = loss / len(index)
        loss.backward()
        return loss.detach()

    def products() -> None:
        torch.mm(rows, wide.t()), torch.mm(grads, wide), torch.mm(grads.t(), rows)

    runs: dict[str, Callable[[], Any]] = {
        "ours": head,
        "torchtitan": torchtitan_run(*theirs, targets, supervised),
        "trl": trl_run(*theirs, targets, supervised),
        "three bare products of the supervised rows, float32": products,
    }
    errors = compare(runs, mine, theirs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    loads = [load()]
    for _ in range(rounds):
        for name, run in runs.items():
            clear(*mine, *theirs)
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
        loads.append(load())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    return {
        "vocabulary": vocabulary,
        "supervised_positions": len(index),
        "dtype": {"ours": str(ours), "peers": str(peers)},
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "median_over_ours": {name: round(value / medians["ours"], 2) for name, value in medians.items()},
        "median_cpu_seconds": {name: round(value, 3) for name, value in cpu_medians.items()},
        "median_cpu_seconds_over_ours": {
            name: round(value / cpu_medians["ours"], 2) for name, value in cpu_medians.items()
        },
        "difference_from_ours": errors,
        "load": loads,
    }


def compare(runs: dict[str, Callable[[], Any]], mine: list[Tensor], theirs: list[Tensor]) -> dict[str, Any]:
    """Relative differences of the peers' loss and gradients from ours; the run ends where one is not the same loss."""
    expected = runs["ours"]()
    found = {}
    for name in ("torchtitan", "trl"):
        clear(*theirs)
        loss = runs[name]()
        pairs = zip(("hidden", "weight"), theirs, mine, strict=True)
        found[name] = {"loss": abs(float(loss - expected)) / float(expected)} | {
            part: relative_error(other.grad, own.grad) for part, other, own in pairs
        }
        # bfloat16 gradients that were summed chunk by chunk are off by some rounding units of 1/256
        if max(found[name].values()) > 0.05:
            raise SystemExit(f"head: {name} computes another loss than ours: {found[name]}; no comparison is possible")
        found[name] = {part: float(f"{value:.1e}") for part, value in found[name].items()}
    clear(*mine, *theirs)
    runs["three bare products of the supervised rows, float32"]()
    return found


def main() -> None:
    """All cases, some minutes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="folder that holds torchtitan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", help="one of the cases; several may be named (default: all)")
    options = parser.parse_args()
    recording, versions = Recording(hidden={options.peers: "FOLDER"}), find_peers(options.peers)
    half = torch.bfloat16
    peers_half = half if cpu_has_products_in(half) else torch.float32
    cases = {
        "float32": (VOCABULARY, torch.float32, torch.float32),
        "bfloat16": (VOCABULARY, half, peers_half),
        "bfloat16, small vocabulary": (SMALL_VOCABULARY, half, half),
    }
    results = {}
    for name in options.case or cases:
        vocabulary, ours, peers = cases[name]
        results[name] = measure(vocabulary, ours, peers, options.rounds)
        print(name, json.dumps(results[name], indent=1), flush=True)
    facts = {"peers": versions, "positions": POSITIONS, "width": WIDTH, "supervised": SUPERVISED}
    recording.write(options.output, {**facts, "cases": results})


if __name__ == "__main__":
    main()
