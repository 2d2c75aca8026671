"""Every family laid over two processes computes what one does: logits and the gradient of every parameter."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.process_group import process_group
from posttrain_lib.parallel.tensor import apply_tensor_parallel
from tests.support.tiny_models import CASES

LENGTHS = (5, 1, 17, 9)
#: float64 sums over ranks in another order, through four layers
EXACT = 1e-10


def run_rank(folder: str, kind: str, rank: int, world: int, port: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients of all trained parameters) of the whole model, the same on every rank."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with process_group(rank, world, f"127.0.0.1:{port}", device):
        spec = spec_from_folder(folder)
        model = build_model(spec, dtype=torch.float64, device="meta" if world > 1 else device)
        if kind == "tensor":
            apply_tensor_parallel(model, init_device_mesh("cpu", (world,)))
        else:
            apply_parallelism(model, world=world, device=device, activation_checkpointing=world > 1)
        if world > 1:
            model.to_empty(device=device)
        load_hf_weights(model, spec, folder)
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(spec.config.vocab_size, (sum(LENGTHS),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        logits = model(token_ids, positions, ends, max(LENGTHS))
        pull = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        # Both ranks compute the same tokens: the average over ranks is the gradient itself.
        (logits * pull).sum().backward()
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return logits.detach(), {name: whole(grad) for name, grad in grads.items()}


def whole(value: Any) -> Tensor:
    """A sharded tensor put together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Callable[[str, str], list[Any]]]:
    """Runs a folder on two processes, which stay up for the whole module."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as first, ProcessPoolExecutor(1, mp_context=spawn) as second:

        def run(folder: str, kind: str) -> list[Any]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            running = [pool.submit(run_rank, folder, kind, rank, 2, port) for rank, pool in enumerate((first, second))]
            return [done.result(timeout=240) for done in running]

        yield run


@pytest.mark.parametrize("kind", ["sharded", "tensor"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_two_ranks_are_one(
    case: str, kind: str, family_folder: Callable[[str], Path], two_ranks: Callable[[str, str], list[Any]]
) -> None:
    folder = str(family_folder(case))
    expected, grads = run_rank(folder, "single", 0, 1, 0)
    for logits, sharded in two_ranks(folder, kind):
        torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT)
        assert set(sharded) == set(grads)
        for name, grad in grads.items():
            limit = EXACT * max(1.0, float(grad.abs().max()))
            torch.testing.assert_close(sharded[name], grad, rtol=0, atol=limit, msg=name)
