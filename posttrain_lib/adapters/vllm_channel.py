"""A process that answers calls, and tensors to it: how the vLLM engine is driven from outside.

Calls and answers are pickled through a pipe. Tensors go through anonymous memory that both processes have open: a copy
into it, none out of it. 500 MB took 0.1 s on one core, and 1.5 s as pickled bytes. The process ends with its driver,
for then its end of the pipe does.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.adapters.vllm_process import SHOWN_LINES, variables
from posttrain_lib.errors import RolloutError

#: bytes of the process's output that are looked at for its last lines
_TAIL = 1 << 16
#: tensors begin at multiples of this in the shared memory; any dtype's alignment
_ALIGNMENT = 64
#: seconds that a process gets to end by itself
_GRACE = 10


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the shared memory: ``offset`` bytes from its beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Channel:
    """The driver's end. One call at a time; after a failure every further call fails with the same words."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Start ``python -m module CALLS MEMORY``, two file descriptors; see :func:`serve`."""
        self._calls, theirs = Pipe()
        self._memory = os.memfd_create("weights")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the channel
        descriptors = (theirs.fileno(), self._memory)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, descriptors)],
            env=variables(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
        )
        theirs.close()
        self._failed: str | None = None

    @property
    def pid(self) -> int:
        """The process's."""
        return self._process.pid

    def call(self, what: str, *arguments: Any, seconds: float) -> Any:
        """What the process answers.

        Raises:
            RolloutError: its own, where it answers with one; it died, before or now; or it did not answer in time, and
                was ended.
        """
        message = pickle.dumps((what, arguments))
        if self._failed is None:
            # Stays where an exception from outside, such as an interrupt, leaves an answer in the pipe.
            self._failed = f"a call was broken off: {what!r}"
            try:
                self._calls.send_bytes(message)
                if self._calls.poll(seconds):
                    answer = self._calls.recv()
                    self._failed = None
                    if isinstance(answer, RolloutError):
                        raise answer
                    return answer
                self._process.kill()
                self._process.wait()
                self._failed = f"no answer to {what!r} in {seconds:g} s"
            except (EOFError, OSError):
                self._failed = f"died with exit code {self._process.wait()} at {what!r}"
        raise RolloutError(
            "the rollout engine's process does not answer any more",
            where=f"process {self.pid}",
            got="\n".join([self._failed, *self._last_lines()]),
            fix="see its last lines; start a new engine, and push the weights to it",
        )

    def place(self, weights: Iterable[tuple[str, Tensor]]) -> list[Placed]:
        """Copy tensors into the shared memory, over those of before; it stays as large as the most that it held."""
        placed, offset = [], 0
        for name, tensor in weights:
            data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            placed.append(Placed(name, tensor.dtype, tuple(tensor.shape), offset))
            end = offset + len(data)
            while offset < end:  # one call writes two gigabytes at most
                offset += os.pwrite(self._memory, data[len(data) - (end - offset) :], offset)
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        return placed

    def close(self) -> None:
        """End the process and give the memory back."""
        self._failed = self._failed or "it was closed"
        self._calls.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._memory)
        self._log.close()

    def _last_lines(self) -> list[str]:
        if self._log.closed:
            return []
        descriptor = self._log.fileno()
        tail = os.pread(descriptor, _TAIL, max(0, os.fstat(descriptor).st_size - _TAIL))
        return tail.decode(errors="replace").splitlines()[-SHOWN_LINES:]


def serve(calls: int, answers: Callable[[str, tuple[Any, ...]], Any]) -> None:
    """The process's end: answer calls until the driver's end closes. A RolloutError is an answer, too; any other
    exception ends the process.

    Args:
        calls: the file descriptor that the process was started with.
        answers: (what, arguments) -> answer.
    """
    connection = Connection(calls)
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = answers(what, arguments)
        except RolloutError as error:
            answer = error
        connection.send(answer)


def placed_tensors(memory: int, placed: Iterable[Placed]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that :meth:`Channel.place` put into the shared memory: views of it, until the next are put there."""
    view = mmap.mmap(memory, 0)
    for each in placed:
        count = torch.Size(each.shape).numel()
        yield each.name, torch.frombuffer(view, dtype=each.dtype, count=count, offset=each.offset).view(each.shape)
