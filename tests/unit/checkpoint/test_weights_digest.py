"""The digest of weights: every bit and every place counts, and blocks add up to the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain_lib.checkpoint import weights_digest as module
from posttrain_lib.checkpoint.weights_digest import block_sum, weights_digest

SHAPE = (6, 10)


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def rectangle(ones: float, others: float) -> Tensor:
    """Two values on the corners of a rectangle: exchanged, every row and column holds what it held before."""
    value = weight()
    value[1, 2] = value[4, 7] = ones
    value[1, 7] = value[4, 2] = others
    return value


def swapped(value: Tensor) -> Tensor:
    changed = value.clone().flatten()
    changed[[3, 41]] = changed[[41, 3]]
    return changed.view_as(value)


PERMUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda value: value.flip(0),
    "columns": lambda value: value.roll(1, 1),
    "both": lambda value: value.flip(0, 1),
    "two entries": swapped,
    "all": lambda value: value.flatten()[torch.randperm(60, generator=torch.Generator().manual_seed(1))].view(SHAPE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PERMUTATIONS)
def test_a_pure_permutation_is_seen(kind: str, dtype: torch.dtype) -> None:
    value = weight(dtype)
    changed = PERMUTATIONS[kind](value)
    assert torch.equal(changed.flatten().sort().values, value.flatten().sort().values)
    assert weights_digest([("a", value)]) != weights_digest([("a", changed)])


def test_an_exchange_that_keeps_what_rows_and_columns_hold_is_seen() -> None:
    one, other = rectangle(1.0, 2.0), rectangle(2.0, 1.0)
    for dim in (0, 1):
        assert torch.equal(one.sort(dim).values, other.sort(dim).values)
    assert weights_digest([("a", one)]) != weights_digest([("a", other)])


def test_permuted_vectors_and_experts_are_seen() -> None:
    for shape in ((12,), (3, 4, 5)):
        value = weight(shape=shape)
        assert weights_digest([("a", value)]) != weights_digest([("a", value.flip(0))])


@pytest.mark.parametrize("bit", [0, 15])
def test_every_bit_of_every_entry_counts(bit: int) -> None:
    value = weight(torch.bfloat16)
    sums = {block_sum(value, (0, 0), SHAPE)}
    for entry in range(value.numel()):
        changed = value.clone()
        changed.view(torch.int16).view(-1)[entry] ^= -(2**15) if bit == 15 else 1 << bit
        sums.add(block_sum(changed, (0, 0), SHAPE))
    assert len(sums) == value.numel() + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_changed_signs_do_not_cancel(dtype: torch.dtype) -> None:
    """The highest bits of several entries: of a product modulo 2^64 no more than they are left."""
    value = weight(dtype)
    sums = {block_sum(value, (0, 0), SHAPE)}
    for entry in range(value.numel()):
        value.view(-1)[entry] *= -1
        sums.add(block_sum(value, (0, 0), SHAPE))
    assert len(sums) == value.numel() + 1


def test_the_name_counts_and_the_order_of_names_does_not() -> None:
    value, changed = weight(), weight() + 1
    assert weights_digest([("a", value)]) != weights_digest([("b", value)])
    assert weights_digest([("a", value), ("b", changed)]) == weights_digest([("b", changed), ("a", value)])


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_blocks_add_up_to_the_whole_in_any_cut(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    value = weight(dtype, (4, 6, 10))
    whole = block_sum(value, (0, 0, 0), value.shape)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    for dim in range(3):
        begin, total = [0, 0, 0], 0
        for part in value.split((1, value.shape[dim] - 1), dim):
            total += block_sum(part, tuple(begin), value.shape)
            begin[dim] += part.shape[dim]
        assert total % 2**64 == whole
