"""What a checkpoint holds of an optimiser, across layouts that part its parameters into other groups."""

from __future__ import annotations

from typing import Any, cast

import pytest
from torch import nn

from posttrain_lib.config.train import Optimizer
from posttrain_lib.optim import build_optimizer
from posttrain_lib.training.state import TrainState

#: matrices and vectors of one mesh, as one rank has them; and of two meshes, as dealt out experts make them
ONE_MESH, TWO_MESHES = (1, 1), (2, 2)


def made(parts: tuple[int, int]) -> TrainState:
    """A state whose optimiser has so many groups of matrices and of vectors."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = build_optimizer(model, Optimizer(weight_decay=0.1))
    groups = []
    for group, count in zip(optimizer.param_groups, parts, strict=True):
        each = len(group["params"]) // count
        groups += [{**group, "params": group["params"][part * each : (part + 1) * each]} for part in range(count)]
    optimizer.param_groups[:] = groups
    return TrainState(cast(Any, model), optimizer, cast(Any, None), {})


@pytest.mark.parametrize(("writer", "reader"), [(ONE_MESH, TWO_MESHES), (TWO_MESHES, ONE_MESH)])
def test_groups_of_another_layout_keep_their_decay(writer: tuple[int, int], reader: tuple[int, int]) -> None:
    saved, state = made(writer), made(reader)
    for number, group in enumerate(saved.optimizer.param_groups):
        group["found"] = 0.5 if number < writer[0] else 0.25  # as by an optimiser that tunes itself
    state.make_optimizer_state([], saved.optimizer_numbers())
    for group in state.optimizer.param_groups:
        matrices = {parameter.ndim for parameter in group["params"]} == {2}
        assert (group["weight_decay"], group["found"]) == ((0.1, 0.5) if matrices else (0.0, 0.25))


def test_groups_of_one_layout_keep_what_is_their_own() -> None:
    saved, state = made(TWO_MESHES), made(TWO_MESHES)
    for number, group in enumerate(saved.optimizer.param_groups):
        group["found"] = number
    state.make_optimizer_state([], saved.optimizer_numbers())
    assert [group["found"] for group in state.optimizer.param_groups] == [0, 1, 2, 3]
