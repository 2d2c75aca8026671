"""A process at the other end of a channel, ``python -m tests.support.answering CALLS MEMORY``, that is no engine."""

from __future__ import annotations

import os
import signal
import struct
import sys
from typing import Any

from posttrain_lib.adapters.vllm_channel import Inbox
from posttrain_lib.errors import RolloutError

INBOX = Inbox(*map(int, sys.argv[1:]))


def answer(what: str, arguments: tuple[Any, ...]) -> Any:
    """What is asked for, in every way that an engine may answer or not."""
    if what == "digest":
        from posttrain_lib.rl.sync_guard import digest_of

        return digest_of(INBOX.tensors(arguments[0]))
    if what == "size":
        return os.fstat(int(sys.argv[2])).st_size
    if what == "half":
        next(INBOX.tensors(arguments[0]))
        raise RolloutError("enough", where="in the midst")
    if what == "refuse":
        raise RolloutError("refused", where="here")
    if what == "crash":
        print("a last word")
        raise ValueError("of its own")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        signal.pause()
    if what == "shut":
        os.close(int(sys.argv[1]))
        signal.pause()
    if what == "half an answer":
        os.write(int(sys.argv[1]), struct.pack("!i", 100) + b"the first part")
        signal.pause()
    return (what, arguments)


if __name__ == "__main__":
    INBOX.serve(answer)
