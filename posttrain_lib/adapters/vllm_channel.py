"""A process that answers calls, and tensors to it: how the vLLM engine is driven from outside.

Calls and answers are pickled through a pipe, each message with its answer; tensors go through memory that both
processes have open (``rl.shared_tensors``). The process ends with its driver, for then its end of the pipe does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.adapters.vllm_process import SHOWN_LINES, variables
from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.shared_tensors import Bucket, DeviceMemory, HostMemory, SharedTensors

#: bytes of the process's output that are looked at for its last lines
_TAIL = 1 << 16
#: seconds that a process gets to end by itself
_GRACE = 10


#: what answers a bucket, so that the next may be put where it lay
TAKEN = "taken"
#: in a bucket's place: there will be no more
_BROKEN_OFF = "broken off"


class Channel:
    """The driver's end. One call at a time; after a failure every further call fails with the same words."""

    def __init__(self, module: str, environment: Mapping[str, str], device: torch.device | None = None) -> None:
        """Start ``python -m module CALLS MEMORY``, two file descriptors; see :class:`Inbox`.

        Args:
            device: the CUDA device that the process computes on, by this process's number: tensors go through its
                memory. None: through the host's.
        """
        self._calls, theirs = Pipe()
        self._pipe = socket.socket(fileno=os.dup(self._calls.fileno()))
        self._host = HostMemory()
        self._memory = self._host if device is None else DeviceMemory(device)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the channel
        descriptors = (theirs.fileno(), self._host.descriptor)
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
        self._send((what, arguments), what, seconds)
        return self._answer(what, seconds)

    def push(self, what: str, weights: Iterable[tuple[str, Tensor]], *arguments: Any, seconds: float) -> Any:
        """As :meth:`call`, with tensors before the other arguments: the process gets their first bucket, and reads them
        all by :meth:`Inbox.tensors`. ``seconds``: for each bucket.

        Raises:
            RolloutError: as :meth:`call`. What iterating raises: the process is told.
        """
        buckets = self._memory.buckets(weights)
        self._send((what, (next(buckets), *arguments)), what, seconds)
        while True:
            try:
                following = next(buckets, None)  # while the process reads the one before
            except BaseException:
                with contextlib.suppress(RolloutError):  # the process says that it was broken off
                    self._answer(what, seconds)
                    self._send(_BROKEN_OFF, what, seconds)
                    self._answer(what, seconds)
                raise
            answer = self._answer(what, seconds)
            if answer != TAKEN:
                return answer
            self._send(following, what, seconds)

    def _send(self, message: Any, what: str, seconds: float) -> None:
        sent = pickle.dumps(message)
        self._check_alive()
        # Stays where an exception from outside, such as an interrupt, leaves an answer in the pipe.
        self._failed = f"a call was broken off: {what!r}"
        self._within(seconds, what, partial(self._calls.send_bytes, sent))

    def _answer(self, what: str, seconds: float) -> Any:
        answer = self._within(seconds, what, self._calls.recv)
        self._failed = None
        if isinstance(answer, RolloutError):
            raise answer
        return answer

    def _within(self, seconds: float, what: str, work: Callable[[], Any]) -> Any:
        """What work with the pipe comes to. The process is ended where nothing moves for so long: it may have stopped
        within a message, too, its own or one that it should read."""
        bound = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._pipe.setsockopt(socket.SOL_SOCKET, option, bound)
        try:
            return work()
        except BlockingIOError:
            self._process.kill()
            self._process.wait()
            self._failed = f"no answer to {what!r} in {seconds:g} s"
        except (EOFError, OSError):
            self._failed = f"died with exit code {self._exit_code()} at {what!r}"
        return self._check_alive()

    def _exit_code(self) -> int:
        """Of the process, which has no pipe any more; it is killed where it does not end."""
        try:
            return self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _check_alive(self) -> None:
        if self._failed is None:
            return
        raise RolloutError(
            "the rollout engine's process does not answer any more",
            where=f"process {self.pid}",
            got="\n".join([self._failed, *self._last_lines()]),
            fix="see its last lines; start a new engine, and push the weights to it",
        )

    def close(self) -> None:
        """End the process and give the memory back."""
        self._failed = self._failed or "it was closed"
        self._calls.close()
        self._pipe.close()
        self._exit_code()
        self._host.close()
        self._log.close()

    def _last_lines(self) -> list[str]:
        if self._log.closed:
            return []
        descriptor = self._log.fileno()
        tail = os.pread(descriptor, _TAIL, max(0, os.fstat(descriptor).st_size - _TAIL))
        return tail.decode(errors="replace").splitlines()[-SHOWN_LINES:]


class Inbox:
    """The process's end."""

    def __init__(self, calls: int, memory: int) -> None:
        """The file descriptors that the process was started with."""
        self._calls = Connection(calls)
        self._shared = SharedTensors(memory)

    def serve(self, answers: Callable[[str, tuple[Any, ...]], Any]) -> None:
        """Answer calls until the driver's end closes. A RolloutError is an answer, too; any other exception ends the
        process.

        Args:
            answers: (what, arguments) -> answer.
        """
        while True:
            try:
                what, arguments = self._calls.recv()
            except EOFError:
                return
            try:
                answer = answers(what, arguments)
            except RolloutError as error:
                answer = error
            self._calls.send(answer)

    def tensors(self, first: Bucket) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a :meth:`Channel.push`, of which the call brought the first bucket; to be read to their end.

        Views of the shared memory: on a device until the end of their bucket, on the host until the next push.
        """
        bucket = first
        while bucket is not None:
            yield from self._shared.of(bucket)
            self._calls.send(TAKEN)
            bucket = self._calls.recv()
            if bucket == _BROKEN_OFF:
                raise RolloutError("the tensors of a push were broken off", fix="push all of them again")
