"""Where the elementwise operations run as one Triton kernel: ``norm_triton``, ``rope_triton``, ``swiglu_triton``."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache  # asked for every norm of every layer
def has_kernels(device_type: str) -> bool:
    """Whether Triton kernels run on this type of device."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


def fuses(*tensors: Tensor) -> bool:
    """Whether a kernel may take these: plain tensors on a GPU, float32 or half precision, outside of ``torch.compile``.

    A compiler fuses torch's own operations with what stands around them, which it cannot do with a kernel. Subclasses
    (tensors laid over ranks, those that are not there yet) know torch's operations alone.
    """
    if torch.compiler.is_compiling():
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter) and has_kernels(tensor.device.type) and tensor.dtype in _DTYPES
        for tensor in tensors
    )
