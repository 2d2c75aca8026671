"""What holds memory, by kind, against counts by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from posttrain_lib.training.memory import MemoryMeter, bytes_of
from posttrain_lib.training.state import TrainState

CPU = torch.device("cpu")
GIB = 2**30


class Two(nn.Module):
    """Two products with nothing between them, so that what is kept for the backward is known: each input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(rows))


def test_kinds_are_what_the_tensors_are() -> None:
    model = Two()
    model.one.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.two.parameters())
    meter = MemoryMeter(model, optimizer, CPU)
    weight, rows = 64 * 64 * 4, 10 * 64 * 4
    assert meter.by_kind() == {"optimizer": 0.0}
    inputs = torch.randn(10, 64)
    for _ in range(2):
        with meter.first_step(saved_tensors=True):
            model(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    # two moments and a counter of one float; of the frozen product nothing is kept, of the other its input
    assert meter.by_kind() == {
        "weights": 2 * weight / GIB,
        "gradients": weight / GIB,
        "optimizer": (2 * weight + 4) / GIB,
        "activations": rows / GIB,
    }


def test_activations_are_those_of_the_largest_micro_batch_not_their_sum() -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters())
    meter = MemoryMeter(model, optimizer, CPU)
    with meter.first_step(saved_tensors=True):
        for count in (10, 30, 20):
            model(torch.randn(count, 64)).sum().backward()
        optimizer.step()
    assert meter.by_kind()["activations"] == 2 * 30 * 64 * 4 / GIB


def test_the_same_gradients_with_and_without_looking() -> None:
    torch.manual_seed(0)
    model, inputs = Two(), torch.randn(10, 64)
    model(inputs).sum().backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU).first_step(saved_tensors=True):
        model(inputs).sum().backward()
    for parameter, before in zip(model.parameters(), plain, strict=True):
        assert before is not None and parameter.grad is not None and torch.equal(parameter.grad, before)


def test_compiled_blocks_on_a_cpu_are_not_looked_into() -> None:
    model = Two()
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with meter.first_step(saved_tensors=False):
        model(torch.randn(1, 64)).sum().backward()
    assert "activations" not in meter.by_kind()


def test_a_storage_counts_once() -> None:
    tensor = torch.zeros(100)
    assert bytes_of([tensor, tensor, tensor[:50], None]) == 400


def test_a_resumed_run_sees_its_own_first_step_not_the_making_of_its_state() -> None:
    model, inputs = Two(), torch.randn(10, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemoryMeter(model, optimizer, CPU)
    state = TrainState(cast(Any, model), optimizer, cast(Any, None), {})
    stored = [f"optimizer.{name}.exp_avg" for name, _ in model.named_parameters()]
    state.make_optimizer_state(stored, {})
    with meter.first_step(saved_tensors=True):
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = meter.by_kind()
    assert found["gradients"] == 2 * 64 * 64 * 4 / GIB
    assert found["activations"] == 2 * 10 * 64 * 4 / GIB


def test_a_first_step_that_was_not_taken_leaves_the_gradients_to_the_next() -> None:
    model, inputs = Two(), torch.randn(10, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemoryMeter(model, optimizer, CPU)
    with pytest.raises(ArithmeticError), meter.first_step(saved_tensors=True):
        raise ArithmeticError("not finite")
    assert "gradients" not in meter.by_kind()
    with meter.first_step(saved_tensors=True):
        model(inputs).sum().backward()
        optimizer.step()
    assert meter.by_kind()["gradients"] == 2 * 64 * 64 * 4 / GIB
