"""Tensors through memory that two descriptors name; a device's buckets are tested in ``tests/gpu``."""

from __future__ import annotations

import torch

from posttrain_lib.rl.shared_tensors import Bucket, HostMemory, SharedTensors

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
