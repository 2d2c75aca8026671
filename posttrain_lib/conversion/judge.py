"""The process that judges: it never runs a proposal, so that nothing a proposal does can reach the verdict.

    python -m posttrain_lib.conversion.judge

It imports the gate and transformers once and forks for each request (a line of JSON on standard input, the answer a
line on standard output), so that each has limits of its own and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_lib.errors import PosttrainError

_PARENT_DEATH_SIGNAL = 1


def verify(request: dict[str, Any]) -> dict[str, Any]:
    """The gate's report on a folder, its family being what a proposal said."""
    from posttrain_lib.checkpoint.verify import verify_model
    from posttrain_lib.conversion.judged import register
    from posttrain_lib.conversion.spec_data import family_data

    folder = Path(request["folder"])
    register(family_data(request["family"]), json.loads((folder / "config.json").read_text(encoding="utf-8")))
    limit = request["memory_limit_bytes"]
    return {"report": verify_model(folder, tier=request["tier"], memory_limit_bytes=limit).to_dict()}


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a folder's fields."""
    from posttrain_lib.conversion.reference_facts import reference_facts

    return {"facts": reference_facts(Path(request["folder"]))}


def twin(request: dict[str, Any]) -> dict[str, Any]:
    """Write a small model of the architecture."""
    from posttrain_lib.conversion.reference_facts import random_reference

    random_reference(request["config"]).save_pretrained(request["folder"])
    return {}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"verify": verify, "facts": facts, "twin": twin}


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """The task's answer; ``refused`` where a model or a definition cannot be used at all."""
    try:
        return TASKS[request["task"]](request)
    except PosttrainError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"error": "MemoryError: the gate needs more memory than it may have"}
    except Exception as error:  # a definition may be wrong in any way: that is an answer, and the next one is fresh
        return {"error": f"{type(error).__name__}: {error}"[:4000]}


def in_a_child(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, answer there, give up when the time is over."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        die_with_parent()
        os.close(read)
        if request.get("data_bytes"):
            resource.setrlimit(resource.RLIMIT_DATA, (request["data_bytes"],) * 2)
        with os.fdopen(write, "wb") as out:
            out.write(json.dumps(answered(request)).encode())
        os._exit(0)
    os.close(write)
    said, deadline = b"", time.monotonic() + request["seconds"]
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([read], [], [], left)[0]:
                part = os.read(read, 1 << 16)
                if not part:
                    break
                said += part
        else:
            return {"timeout": f"the gate was stopped after {request['seconds']:g} seconds"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read)
    if not said:
        return {"killed": f"the gate's process ended with status {status} and no answer"}
    return json.loads(said)


def die_with_parent() -> None:
    """The kernel ends this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Answer requests until the input ends."""
    die_with_parent()
    # What libraries print must not get between the answers.
    answers, nowhere = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    import transformers  # noqa: F401 - seconds, once instead of in every child

    import posttrain_lib.checkpoint.verify  # noqa: F401 - the same

    for line in sys.stdin:
        print(json.dumps(in_a_child(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
