"""How many bytes of tensors a piece of code leaves alive."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Inside, every operator's new memory is noted; :meth:`held` says what of it is still alive, each storage once,
    whoever holds it: a graph's saved tensors, a cache of recomputation, a variable."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code that is compiled stays compiled; its results are noted where it hands them out."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note the storages of its results."""
        out = func(*args, **(kwargs or {}))
        # a view of a weight is no new memory
        old = {
            value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        }
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in old:
                storage = value.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> int:
        """Bytes of the noted storages that are still alive."""
        gc.collect()
        return sum(size for reference, size in self._storages.values() if not reference.expired())
