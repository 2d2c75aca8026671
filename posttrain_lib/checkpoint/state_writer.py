"""One rank's shards to one file: copied into a host buffer that has the file's layout, hashed and written from there.

The buffer is kept for the next save, so that a save costs no page faults but the first. Chunks are hashed with zlib's
crc32: every flipped bit and every burst of up to 32 bits changes it, other damage passes once in 4e9. It ran at 2.4
GB/s a core where sha256 with the CPU's own instructions ran at 1.5 and blake2b at 0.7 (AMD EPYC, one thread), and a
save competes with training for the cores. What names the chunks' checksums is itself under a sha256 in the manifest.
"""

from __future__ import annotations

import json
import mmap
import weakref
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from posttrain_lib.checkpoint.state_files import PAGE_BYTES, CheckpointFolder
from posttrain_lib.checkpoint.state_layout import ALIGNMENT, Part, as_bytes, chunks_of
from posttrain_lib.errors import CheckpointError

#: threads that copy from the host's own memory: one does not use its whole bandwidth
_COPIERS = 2
#: values of a device's largest part that are compared after they were copied
_COMPARED = 1024


def image_file(rank: int) -> str:
    """The file of a rank's shards."""
    return f"tensors-{rank}.bin"


def index_file(rank: int) -> str:
    """What says where in it which box of which tensor stands, and the checksums of its chunks."""
    return f"tensors-{rank}.json"


class HostBuffer:
    """Bytes of the host in page-aligned memory that is used again; pinned where the shards are a CUDA device's.

    The pin goes before the memory does, also where the buffer is only dropped: the driver knows pages by their address
    and would put the copies of whoever gets that address next where this memory was.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._unpin: weakref.finalize[[int], HostBuffer] | None = None

    def reserve(self, size: int, *, pinned: bool) -> torch.Tensor:
        """At least ``size`` bytes, and as many whole pages; what was in it is no longer needed."""
        rounded = -(-max(size, 1) // PAGE_BYTES) * PAGE_BYTES
        if len(self._bytes) < rounded:
            self._release()  # the old one first: never both
            memory = mmap.mmap(-1, rounded)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # 512 times fewer page faults
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        if pinned and self._unpin is None:
            # Not torch's pinned memory, which comes in powers of two. Where the system locks no more pages, copies
            # go through the driver's own buffer: slower, and the same bytes.
            address = self._bytes.data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(address, len(self._bytes), 1)) == 0:
                self._unpin = weakref.finalize(self, _unpin, address)
                self._unpin.atexit = False  # the driver may be gone by then, and so is what could be misled
        return self._bytes[:rounded]

    def _release(self) -> None:
        if self._unpin is not None:
            self._unpin()
        self._bytes, self._unpin = torch.empty(0, dtype=torch.uint8), None


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class RankImage:
    """The file of one rank's parts, in memory. Made at each save; the buffer it lies in outlives it."""

    def __init__(self, parts: Sequence[Part], shapes: Mapping[str, Sequence[int]], buffer: HostBuffer) -> None:
        self.parts, self._shapes = parts, shapes
        self._begins: list[int] = []
        end = 0
        for part in parts:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            self._begins.append(end)
            end += part.nbytes
        self.size = end
        self._bytes = buffer.reserve(end, pinned=any(part.values.is_cuda for part in parts))

    def copy(self, ready: torch.cuda.Event | None) -> None:
        """Take the values as they are now; of a CUDA device, as they are when it has reached ``ready``."""
        if ready is None:
            with ThreadPoolExecutor(_COPIERS, thread_name_prefix="checkpoint-copy") as pool:
                list(pool.map(self._copy, self.parts, self._begins))
            return
        # A stream of its own, so that the copies run beside the next forward and backward.
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for part, begin in zip(self.parts, self._begins, strict=True):
                self._copy(part, begin)
            stream.synchronize()
            self._check_arrival()

    def _check_arrival(self) -> None:
        """Compare a part's end with what a plain copy brings: bytes that a copy put elsewhere would be hashed as they
        are, and the file would look whole.

        Raises:
            CheckpointError: they differ.
        """
        if not self.parts:
            return
        part, begin = max(zip(self.parts, self._begins, strict=True), key=lambda pair: pair[0].nbytes)
        row = part.values.reshape(1) if part.values.ndim == 0 else part.values
        while row.ndim > 1:
            row = row[-1]
        expected = row[-_COMPARED:].cpu().view(torch.uint8)
        end = begin + part.nbytes
        if not torch.equal(self._bytes[end - len(expected) : end], expected):
            raise CheckpointError(
                "a copy from the device did not arrive in the host's memory",
                where=f"host buffer of {self.size} bytes, {part.name}",
                got="other bytes than the device has",
                fix="start the run again: it goes on from its last checkpoint; if it comes again, look at the machine",
            )

    def _copy(self, part: Part, begin: int) -> None:
        place = self._bytes[begin : begin + part.nbytes].view(part.values.dtype)
        place.view(part.values.shape).copy_(part.values, non_blocking=True)

    def write(self, folder: CheckpointFolder, name: str, rank: int) -> tuple[int, str]:
        """Put the image and its index into the checkpoint that is being written; (bytes, the index's text)."""
        memory = as_bytes(self._bytes)
        image = folder.image(name, image_file(rank), self.size)
        try:
            with (
                ThreadPoolExecutor(image.threads, thread_name_prefix="checkpoint-write") as writers,
                ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash") as hasher,  # while they wait for the disk
            ):
                step = image.block_bytes
                written = [
                    writers.submit(image.write, begin, memory[begin : min(begin + step, len(memory))])
                    for begin in range(0, max(self.size, 1), step)
                ]
                hashed = [
                    hasher.submit(_checksums, part, memory[begin : begin + part.nbytes])
                    for part, begin in zip(self.parts, self._begins, strict=True)
                ]
                for done in written:
                    done.result()
                entries = [done.result() for done in hashed]
        except BaseException:
            image.abandon()
            raise
        image.close()
        text = json.dumps({"file": image_file(rank), "tensors": self._index(entries)}, separators=(",", ":"))
        folder.put(name, index_file(rank), text)
        return self.size, text

    def _index(self, checksums: list[list[int]]) -> list[dict[str, Any]]:
        return [
            {
                "name": part.name,
                "dtype": str(part.values.dtype).removeprefix("torch."),
                "shape": list(self._shapes[part.name]),
                "box": [part.box.begin, part.box.shape],
                "byte": begin,
                "crc32": crcs,
            }
            for part, begin, crcs in zip(self.parts, self._begins, checksums, strict=True)
        ]


def _checksums(part: Part, memory: memoryview) -> list[int]:
    crcs, begin = [], 0
    for box in chunks_of(part.box, part.values.element_size()):
        size = box.numel * part.values.element_size()
        crcs.append(zlib.crc32(memory[begin : begin + size]))
        begin += size
    return crcs
