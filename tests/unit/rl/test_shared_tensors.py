"""Tensors through memory that two descriptors name; a device's buckets are tested in ``tests/gpu``."""

from __future__ import annotations

import weakref

import torch

from posttrain_lib.rl.shared_tensors import Bucket, HostMemory, Placed, SharedTensors, _Buffer

WEIGHTS = {
    "view": torch.arange(12.0).reshape(3, 4).t(),
    "odd": torch.arange(7).bfloat16(),
    "none": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def test_a_bucket_holds_what_was_put_into_it() -> None:
    memory = HostMemory()
    shared = SharedTensors(memory.descriptor)
    for change in (0, 1):  # the second time over the first
        weights = {name: tensor if tensor.dtype == torch.bool else tensor + change for name, tensor in WEIGHTS.items()}
        (bucket,) = memory.buckets(weights.items())
        found = dict(shared.of(bucket))
        assert list(found) == list(weights)
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    memory.close()


def test_no_tensors_are_a_bucket_without_any() -> None:
    memory = HostMemory()
    (bucket,) = memory.buckets([])
    assert bucket == Bucket() and list(SharedTensors(memory.descriptor).of(bucket)) == []
    memory.close()


def test_a_buffer_makes_views_once_and_is_freed_with_them() -> None:
    buffer = _Buffer(torch.zeros(256, dtype=torch.uint8))
    placed = (Placed("a", torch.float32, (2, 3), 0), Placed("b", torch.bfloat16, (5,), 64))
    views = buffer.views(placed)
    again = tuple(Placed(each.name, each.dtype, each.shape, each.offset) for each in placed)  # as a pipe brings them
    assert buffer.views(again) is views
    assert buffer.views(placed[:1])[0].data_ptr() == views[0].data_ptr() == buffer.data.data_ptr()
    views[1].fill_(1)
    assert torch.equal(buffer.data[64:74].view(torch.bfloat16), torch.ones(5).bfloat16())
    gone = weakref.ref(buffer.data)
    del views, buffer
    assert gone() is None  # at once: a cycle would keep a device's memory until it is collected
