"""The process behind the channel of :mod:`tests.benchmarks.gpu.push`, ``python -m ... CALLS MEMORY``."""

from __future__ import annotations

import sys

from posttrain_lib.adapters.vllm_channel import Inbox
from tests.benchmarks.gpu.push import Engine

if __name__ == "__main__":
    inbox = Inbox(*map(int, sys.argv[1:]))
    inbox.serve(Engine(inbox).answer)
