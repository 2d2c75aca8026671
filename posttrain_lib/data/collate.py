"""From the loader's numpy arrays to torch tensors: the one file of ``data`` that knows torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from posttrain_lib.schema.batches import PackedBatch

#: int32 on their way here, int64 as torch's look-ups want them
_INDICES = ("token_ids", "target_ids", "positions", "supervised_index")


def to_torch(batch: PackedBatch, device: torch.device | str = "cpu") -> PackedBatch:
    """The batch as tensors on ``device``, of the shapes and dtypes that PackedBatch states.

    On the CPU the tensors share memory with the arrays where the dtype stays. For a CUDA device they pass through
    pinned memory, so that the copy runs beside the computation.
    """
    target = torch.device(device)

    def convert(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if target.type == "cpu":
            return tensor
        if target.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(target, non_blocking=True)

    tensors = batch.map(convert)
    return dataclasses.replace(tensors, **{name: getattr(tensors, name).long() for name in _INDICES})
