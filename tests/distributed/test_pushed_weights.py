"""What a sharded policy pushes is what the whole one does: on every rank, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posttrain_lib.rl.engine.weights import hf_weights
from posttrain_lib.rl.sync_guard import digest_of
from tests.support.engines import loaded
from tests.support.rank_pool import RankPool


def pushed(rank: int, folder: Path) -> str:
    model, spec = loaded(folder, torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return digest_of(hf_weights(model, spec))


@pytest.mark.parametrize("case", ["llama, tied", "phi3", "qwen3_moe", "gpt_oss"])
def test_two_ranks_push_the_whole(case: str, family_folder: Callable[[str], Path], rank_pool: RankPool) -> None:
    """Tensors of one parameter, of three below each other, of one expert each, and of two taking turns."""
    folder = family_folder(case)
    model, spec = loaded(folder, torch.float32)
    assert rank_pool.run(2, pushed, folder) == [digest_of(hf_weights(model, spec))] * 2
