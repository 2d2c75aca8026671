"""The weight files of a Hugging Face folder: where each tensor lies, and single regions of it without the rest."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
#: bytes that are mapped at once: what loading needs besides the parameters themselves
_AT_A_TIME = 8 << 20
Index = tuple[int | slice, ...]
#: dtypes that can be trained, as safetensors spells them
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its shard, dtype as safetensors spells it, shape, and its bytes in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_headers(folder: str | Path) -> dict[str, TensorEntry]:
    """HF tensor name -> place, from the shards' headers alone.

    Raises:
        ModelError: no safetensors, a missing or truncated shard, a broken header or index.
    """
    folder = Path(folder)
    index = _read_index(folder)
    files = sorted(set(index.values())) if index is not None else [WEIGHTS_FILE]
    entries: dict[str, TensorEntry] = {}
    for name in files:
        header, data = _read_header(folder / name)
        for tensor, meta in header.items():
            if tensor in entries:
                raise ModelError(
                    "a tensor is in two shards",
                    where=f"{folder / name}: {tensor}",
                    got=entries[tensor].file,
                    fix="fetch the folder again",
                )
            begin, end = meta["data_offsets"]
            entries[tensor] = TensorEntry(name, meta["dtype"], tuple(meta["shape"]), data + begin, data + end)
    for tensor, name in (index or {}).items():
        if tensor not in entries or entries[tensor].file != name:
            raise ModelError(
                "the index names a tensor that its shard does not hold",
                where=f"{folder / name}: {tensor}",
                fix="fetch the folder again",
            )
    return entries


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard file name, None where there is a single file."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() and not path.is_file():
        return None
    if not path.is_file():
        other = sorted(item.name for item in folder.glob("*") if item.suffix in WEIGHT_SUFFIXES)
        raise ModelError(
            "the model folder has no safetensors weights",
            where=folder,
            got=", ".join(other) or "no weight file",
            expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
            fix=_converting(folder, other),
        )
    try:
        return {str(tensor): str(name) for tensor, name in json.loads(path.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError("the weight index is broken", where=path, got=error, fix="fetch the folder again") from error


def _converting(folder: Path, found: list[str]) -> str:
    """What turns the weight files of other formats that were ``found`` into safetensors."""
    if not found:
        return "fetch them"
    if not any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        return "use the maker's safetensors files"
    new = f"{folder}-safetensors"
    return (
        'convert them once: python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({new!r}); "
        f'AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({new!r})"'
    )


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(header of one safetensors file, byte at which its data begins), checked against the file's size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ModelError("a shard of the model is missing", where=path, fix="fetch the missing file") from error
    broken = "the file does not start like safetensors"
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ModelError(
                "a shard of the model is truncated or no safetensors file",
                where=path,
                got=f"{size} bytes",
                expected=f"a header of {length} bytes and the tensors behind it",
                fix="fetch the file again (a Git LFS pointer is no weight file)",
            )
        try:
            header = json.loads(handle.read(length))
            tensors = {name: meta for name, meta in header.items() if name != "__metadata__"}
            end = max((meta["data_offsets"][1] for meta in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(broken, where=path, got=error, fix="fetch the file again") from error
    if size != 8 + length + end:
        raise ModelError(
            "a shard of the model is truncated" if size < 8 + length + end else "a shard has bytes that belong nowhere",
            where=path,
            got=f"{size} bytes",
            expected=f"{8 + length + end} bytes by its own header",
            fix="fetch the file again",
        )
    return tensors, 8 + length


class StoredTensors:
    """Copies tensors of a folder, or regions of them, some megabytes at a time: only the pages of the file that hold
    the region are touched, and nothing stays mapped behind a call."""

    def __init__(self, folder: str | Path, entries: Mapping[str, TensorEntry] | None = None) -> None:
        self.folder = Path(folder)
        self.entries = read_headers(folder) if entries is None else entries

    def dtype(self, tensor: str) -> torch.dtype:
        """Of a stored tensor."""
        return DTYPES[self.entries[tensor].dtype]

    def read(self, tensor: str, index: Index = ()) -> Tensor:
        """A copy of ``tensor[index]`` in the file's dtype, on the CPU; of the whole without an index."""
        shape = self.entries[tensor].shape
        index = (*index, *(slice(0, size) for size in shape[len(index) :]))
        found = torch.empty(torch.empty(shape, device="meta")[index].shape, dtype=self.dtype(tensor))
        self.copy(tensor, index, found)
        return found

    def copy(self, tensor: str, index: Index, into: Tensor, *, transposed: bool = False) -> None:
        """``into`` becomes ``tensor[index]``, its last two dimensions swapped if ``transposed``.

        Args:
            index: a whole number or a slice with a start and an end for each dimension of the stored tensor.
            into: any dtype and device.
        """
        entry = self.entries[tensor]
        if not into.numel():
            return
        first = index[0] if index else 0
        begin, end = (first.start, first.stop) if isinstance(first, slice) else (first, first + 1)
        if not index or (isinstance(first, slice) and (first.step or 1) != 1) or (transposed and into.dim() == 2):
            self._copy_rows(entry, 0, entry.shape[0] if entry.shape else 1, index, into, transposed)
            return
        row_bytes = max(1, (entry.end - entry.begin) // entry.shape[0])
        step = max(1, _AT_A_TIME // row_bytes)
        for start in range(begin, end, step):
            stop = min(end, start + step)
            inner: Index = (slice(0, stop - start) if isinstance(first, slice) else 0, *index[1:])
            part = into[start - begin : stop - begin] if isinstance(first, slice) else into
            self._copy_rows(entry, start, stop, inner, part, transposed)

    def _copy_rows(
        self, entry: TensorEntry, start: int, stop: int, index: Index, into: Tensor, transposed: bool
    ) -> None:
        """From rows ``start`` to ``stop`` of the first dimension, the only ones mapped; ``index`` counts from them."""
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = (entry.end - entry.begin) // rows
        begin, end = entry.begin + start * row_bytes, entry.begin + stop * row_bytes
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        with open(self.folder / entry.file, "rb") as handle:
            # Private and writable, for torch warns of buffers that it may not write to; nothing writes.
            mapped = mmap.mmap(handle.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        whole = torch.frombuffer(
            mapped, dtype=DTYPES[entry.dtype], count=torch.Size(shape).numel(), offset=begin - page
        ).view(shape)
        found = whole[index]
        into.copy_(found.transpose(-1, -2) if transposed else found)
        del whole, found
        mapped.close()
