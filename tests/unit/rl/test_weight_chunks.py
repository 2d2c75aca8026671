"""Weights in chunks: what goes in comes out, bit for bit, and no chunk is larger than asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.rl.weight_chunks import from_chunks, in_chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
tensors = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=3), st.booleans()), max_size=6
)


def made(kinds: list[tuple[torch.dtype, list[int], bool]]) -> list[tuple[str, torch.Tensor]]:
    """Named tensors, some of them transposed views."""
    found = []
    for number, (dtype, shape, turned) in enumerate(kinds):
        value = (torch.randn(shape) * 10).to(dtype)
        found.append((f"layer.{number}", value.mT if turned and value.ndim > 1 else value))
    return found


@given(kinds=tensors, most=st.integers(1, 200))
def test_what_goes_in_comes_out(kinds, most: int) -> None:
    sent = made(kinds)
    chunks = list(in_chunks(sent, most))
    assert all(sum(len(part.data) for part in chunk) <= most for chunk in chunks)
    # FSDP frees and fills the storage of what it gathers; numpy() of it would forbid that for good
    assert all(tensor.untyped_storage().resizable() for _, tensor in sent)
    got = list(from_chunks(chunks))
    assert [name for name, _ in got] == [name for name, _ in sent]
    for (_, left), (_, right) in zip(got, sent, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@given(kinds=tensors, most=st.integers(1, 200))
def test_a_rank_that_sends_nothing_stops_where_the_others_do(kinds, most: int) -> None:
    """As each chunk comes, both have read equally many tensors: a gathering within would find its peers."""
    sent = made(kinds)
    moments = []
    for sends in (True, False):
        read = 0

        def counted(sent=sent):
            nonlocal read
            for item in sent:
                read += 1
                yield item

        found = []
        for chunk in in_chunks(counted(), most, sends=sends):
            found.append(read)
            assert sends or not chunk
        moments.append((found, read))
    # where only empty tensors are left, the sender has one more chunk, and nothing is read for it
    (sender, whole), (other, all_read) = moments
    assert whole == all_read and sender[: len(other)] == other and set(sender[len(other) :]) <= {whole}


def test_what_is_lost_on_the_way_is_said() -> None:
    chunks = list(in_chunks([("a", torch.arange(10.0)), ("b", torch.ones(3))], 16))
    with pytest.raises(ValueError, match="does not follow"):
        list(from_chunks(chunks[1:]))
    with pytest.raises(ValueError, match="does not follow"):
        list(from_chunks([chunks[0], *chunks[2:]]))
    with pytest.raises(ValueError, match="end within a tensor"):
        list(from_chunks(chunks[:2]))
    stranger = [[dataclasses.replace(chunks[0][0], shape=(3,))]]
    with pytest.raises(ValueError, match="does not follow"):
        list(from_chunks(stranger))
