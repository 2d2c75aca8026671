"""Optimisers by name, decay on matrices only, schedules as functions of the step, clipping."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.config.train import Optimizer, Schedule
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.optim import build_optimizer, parameter_groups
from posttrain_lib.optim.clipping import clip_gradients, gradient_norm
from posttrain_lib.optim.schedules import lr_factor


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def test_decay_is_for_matrices_alone() -> None:
    groups = build_optimizer(model(), Optimizer(weight_decay=0.1)).param_groups
    decay = {parameter.ndim: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in groups) == 4


def test_biases_of_experts_do_not_decay_though_they_lie_in_a_matrix(family_folder: Callable[[str], Path]) -> None:
    spec = spec_from_folder(family_folder("gpt_oss"))
    experts = build_model(spec, device="meta")
    groups = parameter_groups(experts, 0.1)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    biases = {name: p for name, p in experts.named_parameters() if name.endswith("bias") and p.requires_grad}
    assert any(parameter.ndim == 2 for parameter in biases.values())
    assert {decay[id(parameter)] for parameter in biases.values()} == {0.0}
    assert decay[id(experts.layers[0].mlp.experts.gate_proj)] == 0.1


def test_frozen_parameters_are_left_out() -> None:
    frozen = model()
    frozen[0].weight.requires_grad_(False)
    assert all(p.requires_grad for g in build_optimizer(frozen, Optimizer()).param_groups for p in g["params"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("torch.optim:Adagrad", torch.optim.Adagrad)],
)
def test_by_name(name: str, kind: type) -> None:
    built = build_optimizer(model(), Optimizer(name=name, lr=0.5))
    assert type(built) is kind
    assert built.param_groups[0]["lr"] == 0.5


def test_betas_reach_every_optimiser_that_has_them() -> None:
    config = Optimizer(name="torch.optim:NAdam", betas=(0.5, 0.6), options={"momentum_decay": 0.01})
    built = build_optimizer(model(), config)
    assert built.param_groups[0]["betas"] == (0.5, 0.6)
    assert built.param_groups[0]["momentum_decay"] == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, "did you mean 'adamw'"),
        ({"name": "no.such.module:Thing"}, "cannot be imported"),
        ({"name": "torch.optim:Thing"}, "cannot be imported"),
        ({"options": {"momentums": 1}}, "momentums"),
        ({"options": {"betas": (2.0, 0.9)}}, "Invalid beta"),
    ],
)
def test_mistakes_are_config_errors(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model(), Optimizer(**settings))


@given(
    name=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 20),
    rest=st.integers(1, 200),
    min_ratio=st.floats(0, 1),
)
def test_schedules(name: str, warmup: int, rest: int, min_ratio: float) -> None:
    schedule = Schedule(name=name, warmup_steps=warmup, min_ratio=min_ratio)
    total = warmup + rest
    factors = [lr_factor(step, schedule, total) for step in range(1, total + 1)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    assert falling[-1] == pytest.approx(1.0 if name == "constant" else min_ratio, abs=1e-12)
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert lr_factor(50, Schedule(name="cosine", min_ratio=0.2), 100) == pytest.approx(0.6)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping(limit: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(3,), (2, 2), (1,)]]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.full((2, 2), 2.0)
    norm = gradient_norm(parameters)
    assert float(norm) == pytest.approx(5.0)
    clip_gradients(parameters, limit, norm)
    # torch divides by norm + 1e-6
    assert float(gradient_norm(parameters)) == pytest.approx(min(5.0, limit), rel=1e-6)
