"""Storages that are alive while and after something runs: what autograd, and whatever else, keeps of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Inside, every storage that an operator returns is noted, once; parameters of ``model`` are left out.

    ``peak_bytes``: the most that were alive at the same time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own:
                    self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes())
        return result

    def alive_bytes(self) -> int:
        """Of what is still there."""
        self._seen = {key: item for key, item in self._seen.items() if not item[0].expired()}
        return sum(size for _, size in self._seen.values())
