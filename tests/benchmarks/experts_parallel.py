"""What dealing experts out over ranks costs: a mixture in one process and over two, in one run:

    python -m tests.benchmarks.experts_parallel --output tests/benchmarks/results/experts_parallel.json

Forward and backward of one mixture over gloo on this machine, its ranks with one thread each and as many tokens each as
the one process has. Minimum and median in ms, and of the two ranks' time the part in all-to-alls, which holds the wait
for the other rank: it has other tokens, and shares the cores.
"""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from posttrain_lib.ops.experts import mixture
from posttrain_lib.ops.swiglu import swiglu
from posttrain_lib.parallel.experts import AllToAll
from tests.benchmarks.recording import Recording, argument_parser
from tests.support.rank_pool import RankPool

#: tokens of a rank, hidden, forward, experts, experts of a token
CASES = [(512, 256, 128, 16, 4), (512, 512, 512, 8, 2)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(rank: int, sizes: tuple[int, int, int, int, int], dtype: str, rounds: int) -> dict[str, Any]:
    """Times of one rank of the group it is in, in seconds, of each round: (all, in all-to-alls)."""
    tokens, hidden, forward, count, choices = sizes
    kind, world = DTYPES[dtype], dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(rank)
    ids = torch.rand(tokens, count).argsort(1)[:, :choices]
    shares = torch.rand(tokens, choices)
    rows = torch.randn(tokens, hidden).to(kind).requires_grad_()
    shapes = [(count, forward, hidden), (count, forward, hidden), (count, hidden, forward)]
    matrices: list[Tensor] = [torch.randn(shape).mul_(shape[-1] ** -0.5).to(kind) for shape in shapes]
    exchange = None
    if world > 1:
        deal = init_device_mesh("cpu", (world,), mesh_dim_names=("expert",))
        matrices = [distribute_tensor(matrix, deal, [Shard(0)]) for matrix in matrices]
        exchange = AllToAll(deal.get_group())
    trained = [rows, *(matrix.requires_grad_() for matrix in matrices)]
    moving, moved, send = 0.0, 0, dist.all_to_all_single

    def timed(output: Tensor, given: Tensor, *args: Any, **options: Any) -> None:
        nonlocal moving, moved
        begun = time.perf_counter()
        send(output, given, *args, **options)
        moving += time.perf_counter() - begun
        moved += given.numel() * given.itemsize

    times = []
    with mock.patch.object(dist, "all_to_all_single", timed):
        for _ in range(rounds + 1):
            moving, moved, begun = 0.0, 0, time.perf_counter()
            output = mixture(rows, ids, shares, *matrices, activation=swiglu, exchange=exchange)
            torch.autograd.grad(output.sum(), trained)
            times.append((time.perf_counter() - begun, moving))
    return {"times": times[1:], "bytes": moved}  # the first round allocates


def figures(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of the first rank: ms, the part in all-to-alls, MiB that it put into them in one round."""
    times = results[0]["times"]
    everything = [whole for whole, _ in times]
    return {
        "minimum_ms": round(min(everything) * 1e3, 2),
        "median_ms": round(statistics.median(everything) * 1e3, 2),
        "all_to_all_share": round(sum(moving for _, moving in times) / sum(everything), 3),
        "sent_mib": round(results[0]["bytes"] / 2**20, 2),
    }


def main() -> None:
    """All cases, under a minute on a quiet machine."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds of each case")
    options = parser.parse_args()
    recording = Recording()
    cases, pool = [], RankPool(2)
    try:
        for sizes in CASES:
            for dtype in DTYPES:
                found = {
                    name: figures(pool.run(world, run, sizes, dtype, options.rounds))
                    for name, world in (("one_rank", 1), ("two_ranks", 2))
                }
                names = ("tokens_of_a_rank", "hidden", "forward", "experts", "choices")
                cases.append({**dict(zip(names, sizes, strict=True)), "dtype": dtype, **found})
                print(cases[-1])
    finally:
        pool.close()
    recording.write(options.output, {"cases": cases})


if __name__ == "__main__":
    main()
