"""numpy -> torch: same numbers, same dtypes, and on the CPU the same memory."""

from __future__ import annotations

import numpy as np
import torch

from posttrain_lib.data.collate import to_torch
from posttrain_lib.schema.batches import PackedBatch


def _batch() -> PackedBatch:
    return PackedBatch(
        token_ids=np.array([5, 6, 7, 0], np.int64),
        target_ids=np.array([6, 7, 0, 0], np.int64),
        loss_weights=np.array([0, 0.5, 0, 0], np.float32),
        positions=np.array([0, 1, 2, 0], np.int64),
        cu_seqlens=np.array([0, 3, 4], np.int32),
        supervised_index=np.array([1], np.int64),
        document_sources=np.array([0, -1], np.int32),
        document_ids=np.array([9, -1], np.int64),
        max_seqlen=3,
        real_tokens=3,
    )


def test_tensors_share_the_arrays_memory() -> None:
    arrays = _batch()
    tensors = to_torch(arrays)
    for name in PackedBatch.ARRAYS:
        array, tensor = getattr(arrays, name), getattr(tensors, name)
        assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        assert str(tensor.dtype) == f"torch.{array.dtype.name}" and tensor.tolist() == array.tolist()
        assert tensor.data_ptr() == array.ctypes.data
    assert (tensors.max_seqlen, tensors.real_tokens, tensors.num_tokens) == (3, 3, 4)


def test_a_device_is_honoured() -> None:
    tensors = to_torch(_batch(), "meta")
    assert {getattr(tensors, name).device.type for name in PackedBatch.ARRAYS} == {"meta"}
