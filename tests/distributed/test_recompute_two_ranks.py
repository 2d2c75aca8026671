"""Recomputation and compiled blocks under sharding: two processes with either compute what they do without."""

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

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import apply_lora, init_adapters
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.compilation import compile_blocks
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.parallel.process_group import process_group
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.lora_cases import everything_of
from tests.support.packed_row import ROWS, run_row

CPU = torch.device("cpu")
#: float64, the same operators in another order, through four layers
EXACT = 1e-12
Result = tuple[Tensor, dict[str, Tensor], list[str]]


def run_rank(folder: str, mode: Any, compiled: bool, lora: bool, rank: int, port: int) -> Result:
    """(hidden states, whole gradients, names of the weights) of two rows with the sharded model."""
    torch.set_num_threads(1)
    with process_group(rank, 2, f"127.0.0.1:{port}", CPU):
        spec = spec_from_folder(folder)
        model: Any = build_model(spec, dtype=torch.float64, device="meta")
        if lora:
            model = apply_lora(model, everything_of(model))
        if compiled:
            # As apply_parallelism does, by a compiler of torch's that needs no other; before sharding.
            compile_blocks(model, backend="aot_eager")
        apply_parallelism(model, mesh=rank_mesh(MeshSpec(shard=2), CPU), activation_checkpointing=mode)
        model.to_empty(device="cpu")
        load_hf_weights(model, spec, folder)
        if lora:
            init_adapters(model, seed=0)
        run_row(model, ROWS[0])
        hidden, grads = run_row(model, ROWS[1])  # other documents, gradients of both rows
        return hidden, grads, list(model.state_dict())


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Callable[..., Result]]:
    """Runs on two processes, which stay up for the whole module; the first one's result."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as first, ProcessPoolExecutor(1, mp_context=spawn) as second:

        def run(folder: Path, mode: str, *, compiled: bool = False, lora: bool = False) -> Result:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            orders = (str(folder), mode, compiled, lora)
            running = [pool.submit(run_rank, *orders, rank, port) for rank, pool in enumerate((first, second))]
            results = [done.result(timeout=240) for done in running]
            assert all(torch.equal(results[1][1][name], grad) for name, grad in results[0][1].items())
            return results[0]

        yield run


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("case", ["qwen3", "mixtral"])
def test_sharded_recomputation_gives_the_same_bits(
    case: str, lora: bool, family_folder: Callable[[str], Path], two_ranks: Callable[..., Result]
) -> None:
    expected, grads, names = two_ranks(family_folder(case), "none", lora=lora)
    for mode in ("selective", "full"):
        hidden, found, same_names = two_ranks(family_folder(case), mode, lora=lora)
        assert same_names == names
        assert torch.equal(hidden, expected)
        assert list(found) == list(grads)
        assert all(torch.equal(found[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize(("case", "mode", "lora"), [("qwen3", "full", True), ("mixtral", "none", False)])
def test_sharded_compiled_blocks_compute_the_same(
    case: str, mode: str, lora: bool, family_folder: Callable[[str], Path], two_ranks: Callable[..., Result]
) -> None:
    expected, grads, names = two_ranks(family_folder(case), "none", lora=lora)
    hidden, found, same_names = two_ranks(family_folder(case), mode, compiled=True, lora=lora)
    assert same_names == names
    torch.testing.assert_close(hidden, expected, rtol=0, atol=EXACT * float(expected.abs().max()))
    assert list(found) == list(grads)
    for name, grad in grads.items():
        limit = EXACT * max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(found[name], grad, rtol=0, atol=limit, msg=lambda text, n=name: f"{n}: {text}")
