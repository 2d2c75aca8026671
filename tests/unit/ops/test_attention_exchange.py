"""Keys that travel, in a group of one process that sends rows to itself; ``tests/distributed`` has real groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from posttrain_lib.ops.attention_exchange import KeyExchange, exchanged_keys


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


#: tokens 3, 1 and 3 again arrive at the places 4, 5 and 6
EXCHANGE = KeyExchange(send_index=torch.tensor([3, 1, 3]), sent=(3,), received=(3,), travels=True)
INDEX = torch.tensor([0, 4, 4, 1, 5, 6])
SOURCE = torch.tensor([0, 3, 3, 1, 1, 3])


def test_rows_arrive_behind_the_own_ones(group: None) -> None:
    key, value = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    found = exchanged_keys(key, value, INDEX, EXCHANGE)
    assert torch.equal(found[0], key[SOURCE]) and torch.equal(found[1], value[SOURCE])


def test_gradients_come_back(group: None) -> None:
    key, value = (torch.randn(4, 1, width, dtype=torch.float64, requires_grad=True) for width in (2, 3))
    assert torch.autograd.gradcheck(lambda key, value: exchanged_keys(key, value, INDEX, EXCHANGE), (key, value))


def test_what_the_copies_of_a_row_get_is_added_in_float32() -> None:
    """512 times 1/256 in bfloat16 would stop at 1, where a sum of its own is finer."""
    copies = 512
    exchange = KeyExchange(torch.zeros(0, dtype=torch.int64), (0,), (0,), travels=False)
    key = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    found, _ = exchanged_keys(key, key.detach(), torch.zeros(copies, dtype=torch.int64), exchange)
    (found / 256).sum().backward()
    assert key.grad is not None and key.grad.item() == copies / 256


def test_nobody_is_called_where_nothing_travels() -> None:
    """There is no process group at all here."""
    exchange = KeyExchange(torch.zeros(0, dtype=torch.int64), (0, 0), (0, 0), travels=False)
    key = torch.randn(3, 1, 2, requires_grad=True)
    found, _ = exchanged_keys(key, key, torch.tensor([2, 0]), exchange)
    assert torch.equal(found, key[[2, 0]])
    found.sum().backward()
    assert key.grad is not None
    assert key.grad[:, 0, 0].tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="process group"):
        exchanged_keys(key, key, torch.tensor([2, 0]), dataclasses.replace(exchange, travels=True))
