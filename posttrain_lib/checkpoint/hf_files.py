"""The weight files of a Hugging Face folder: where each tensor lies, and single regions of it without the rest."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.checkpoint.weight_files import (
    AT_A_TIME,
    WEIGHT_SUFFIXES,
    Span,
    WeightFiles,
    read_bytes,
    weight_files,
)
from posttrain_lib.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: headers read together: in a store each costs two round trips
_HEADERS_AT_ONCE = 16
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


@dataclass(frozen=True)
class Region:
    """``into`` becomes ``tensor[index]``, its last two dimensions swapped if ``transposed``.

    ``index``: a whole number or a slice with a start and an end for each dimension of the stored tensor. ``into``: any
    dtype and device.
    """

    tensor: str
    index: Index
    into: Tensor
    transposed: bool = False


def read_headers(folder: str | Path) -> dict[str, TensorEntry]:
    """HF tensor name -> place, from the shards' headers alone. ``folder``: as :func:`weight_files` takes it.

    Raises:
        ModelError: no safetensors, a missing or truncated shard, a broken header or index.
    """
    return headers_of(weight_files(folder), str(folder))


def headers_of(files: WeightFiles, folder: str) -> dict[str, TensorEntry]:
    """The same of files that are open already; ``folder`` as an error names it."""
    index = _read_index(files, folder)
    names = sorted(set(index.values())) if index is not None else [WEIGHTS_FILE]
    entries: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(min(_HEADERS_AT_ONCE, len(names))) as pool:
        headers = list(pool.map(lambda name: _read_header(files, name), names))
    for name, (header, data) in zip(names, headers, strict=True):
        for tensor, meta in header.items():
            if tensor in entries:
                raise ModelError(
                    "a tensor is in two shards",
                    where=f"{files.where(name)}: {tensor}",
                    got=entries[tensor].file,
                    fix="fetch the folder again",
                )
            begin, end = meta["data_offsets"]
            entries[tensor] = TensorEntry(name, meta["dtype"], tuple(meta["shape"]), data + begin, data + end)
    for tensor, name in (index or {}).items():
        if tensor not in entries or entries[tensor].file != name:
            raise ModelError(
                "the index names a tensor that its shard does not hold",
                where=f"{files.where(name)}: {tensor}",
                fix="fetch the folder again",
            )
    return entries


def _read_index(files: WeightFiles, folder: str) -> dict[str, str] | None:
    """Tensor -> shard file name, None where there is a single file."""
    names = files.names()
    if INDEX_FILE not in names:
        if WEIGHTS_FILE in names:
            return None
        other = sorted(name for name in names if PurePosixPath(name).suffix in WEIGHT_SUFFIXES)
        if any(name.endswith(".safetensors") for name in other):
            raise ModelError(
                "the model's weights lie in several files and their index is missing",
                where=folder,
                got=", ".join(other),
                expected=f"{INDEX_FILE}, which says where each tensor lies; or all of them in {WEIGHTS_FILE}",
                fix=f"fetch {INDEX_FILE} as well",
            )
        raise ModelError(
            "the model folder has no safetensors weights",
            where=folder,
            got=", ".join(other) or "no weight file",
            expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
            fix=_converting(folder, other),
        )
    try:
        text = read_bytes(files, INDEX_FILE, 0, files.size(INDEX_FILE))
        return {str(tensor): str(name) for tensor, name in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the weight index is broken", where=files.where(INDEX_FILE), got=error, fix="fetch the folder again"
        ) from error


def _converting(folder: str, found: list[str]) -> str:
    """What turns the weight files of other formats that were ``found`` into safetensors."""
    if not found:
        return "fetch them"
    if not any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        return "use the maker's safetensors files"
    new = f"{PurePosixPath(folder).name}-safetensors" if "://" in folder else f"{folder}-safetensors"
    return (
        'convert them once: python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
        f"AutoModelForCausalLM.from_pretrained({folder!r}, dtype='auto').save_pretrained({new!r}); "
        f'AutoTokenizer.from_pretrained({folder!r}).save_pretrained({new!r})"'
    )


def _read_header(files: WeightFiles, name: str) -> tuple[dict[str, dict[str, Any]], int]:
    """(header of one safetensors file, byte at which its data begins), checked against the file's size."""
    size, where = files.size(name), files.where(name)
    length = struct.unpack("<Q", read_bytes(files, name, 0, 8))[0] if size >= 8 else 0
    if not 2 <= length <= size - 8:
        raise ModelError(
            "a shard of the model is truncated or no safetensors file",
            where=where,
            got=f"{size} bytes",
            expected=f"a header of {length} bytes and the tensors behind it",
            fix="fetch the file again (a Git LFS pointer is no weight file)",
        )
    try:
        header = json.loads(read_bytes(files, name, 8, 8 + length))
        tensors = {tensor: meta for tensor, meta in header.items() if tensor != "__metadata__"}
        end = _checked_end(tensors, where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the file does not start like safetensors", where=where, got=error, fix="fetch the file again"
        ) from error
    if size != 8 + length + end:
        raise ModelError(
            "a shard of the model is truncated" if size < 8 + length + end else "a shard has bytes that belong nowhere",
            where=where,
            got=f"{size} bytes",
            expected=f"{8 + length + end} bytes by its own header",
            fix="fetch the file again",
        )
    return tensors, 8 + length


def _checked_end(tensors: Mapping[str, Mapping[str, Any]], where: str) -> int:
    """Where the last tensor ends. Each must begin where the one before it does, and have the bytes that its shape says:
    a header in which one digit changed would otherwise give weights out of another tensor's bytes."""
    at = 0
    for tensor, meta in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = meta["data_offsets"]
        dtype = DTYPES.get(meta["dtype"])  # how wide others are is not known here, and none of them is read
        size = max(0, end - begin) if dtype is None else math.prod(meta["shape"]) * dtype.itemsize
        if (begin, end) != (at, at + size):
            raise ModelError(
                "the header of a shard gives a tensor a place that it cannot have",
                where=f"{where}: {tensor}",
                got=f"{meta['dtype']} {meta['shape']} at bytes {begin} to {end}",
                expected=f"bytes from {at} on, as many as the shape needs",
                fix="fetch the file again",
            )
        at = end
    return at


class StoredTensors:
    """Copies tensors of a folder, or regions of them, some megabytes at a time: only the bytes of the files that hold
    the regions are touched (whole rows of a tensor where a region has some of its columns), and nothing of them stays
    in memory behind a call. ``folder``: as :func:`weight_files` takes it."""

    def __init__(self, folder: str | Path, entries: Mapping[str, TensorEntry] | None = None) -> None:
        self.files = weight_files(folder)
        self.entries = headers_of(self.files, str(folder)) if entries is None else entries

    def where(self, tensor: str) -> str:
        """File and tensor, as an error names them."""
        return f"{self.files.where(self.entries[tensor].file)}: {tensor}"

    def dtype(self, tensor: str) -> torch.dtype:
        """Of a stored tensor."""
        return DTYPES[self.entries[tensor].dtype]

    def read(self, tensor: str, index: Index = ()) -> Tensor:
        """A copy of ``tensor[index]`` in the file's dtype, on the CPU; of the whole without an index."""
        shape = self.entries[tensor].shape
        index = (*index, *(slice(0, size) for size in shape[len(index) :]))
        found = torch.empty(torch.empty(shape, device="meta")[index].shape, dtype=self.dtype(tensor))
        self.copy([Region(tensor, index, found)])
        return found

    def copy(self, regions: Iterable[Region]) -> None:
        """Fill every region's ``into``, in the order of the files: neighbours are read at once."""
        parts = sorted(
            (part for region in regions if region.into.numel() for part in self._parts(region)),
            key=lambda part: (part.file, part.begin),
        )
        blocks = list(_blocks(parts))
        buffers = self.files.buffers(span for span, _ in blocks)
        for (span, members), (buffer, first) in zip(blocks, buffers, strict=True):
            for part in members:
                part.fill(buffer, first + part.begin - span[1])

    def _parts(self, region: Region) -> Iterator[_Part]:
        entry = self.entries[region.tensor]
        what = region.index, region.into, region.transposed
        return _cut(entry.file, entry.begin, DTYPES[entry.dtype], entry.shape, what)


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of a stored tensor, or of a tensor in it, and what some of their entries fill."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    index: Index
    into: Tensor
    transposed: bool

    def fill(self, buffer: Any, offset: int) -> None:
        """Out of a buffer in which the rows begin at ``offset``. Nothing keeps the buffer."""
        rows = torch.frombuffer(buffer, dtype=self.dtype, count=math.prod(self.shape), offset=offset).view(self.shape)
        found = rows[self.index]
        self.into.copy_(found.transpose(-1, -2) if self.transposed else found)


def _cut(
    file: str, begin: int, dtype: torch.dtype, shape: tuple[int, ...], what: tuple[Index, Tensor, bool]
) -> Iterator[_Part]:
    """A region of a tensor of this shape that begins at this byte, in parts of AT_A_TIME bytes at the most."""
    index, into, transposed = what
    while index and isinstance(index[0], int):
        begin += index[0] * math.prod(shape[1:]) * dtype.itemsize
        shape, index = shape[1:], index[1:]
    if not shape:
        yield _Part(file, begin, begin + dtype.itemsize, dtype, shape, index, into, False)
        return
    first, row = index[0] if index else slice(None), math.prod(shape[1:]) * dtype.itemsize
    assert isinstance(first, slice)
    places = range(*first.indices(shape[0]))
    along = 1 if transposed and into.dim() == 2 else 0  # the dimension of ``into`` that these rows are
    if row > AT_A_TIME and len(shape) > 1:
        for number, place in enumerate(places):
            inner = index[1:], into.select(along, number), transposed and along == 0
            yield from _cut(file, begin + place * row, dtype, shape[1:], inner)
        return
    together = max(1, AT_A_TIME // (row * places.step))
    for number in range(0, len(places), together):
        here = places[number : number + together]
        count = here[-1] - here[0] + 1
        yield _Part(
            file,
            begin + here[0] * row,
            begin + (here[-1] + 1) * row,
            dtype,
            (count, *shape[1:]),
            (slice(0, count, here.step), *index[1:]),
            into.narrow(along, number, len(here)),
            transposed,
        )


def _blocks(parts: Iterable[_Part]) -> Iterator[tuple[Span, list[_Part]]]:
    """Parts in order, those together that overlap or touch, as far as AT_A_TIME goes."""
    span, members = ("", 0, 0), list[_Part]()
    for part in parts:
        file, begin, end = span
        touches = bool(members) and part.file == file and part.begin <= end
        if touches and max(end, part.end) - begin <= AT_A_TIME:
            span = (file, begin, max(end, part.end))
            members.append(part)
            continue
        if members:
            yield span, members
        span, members = (part.file, part.begin, part.end), [part]
    if members:
        yield span, members
