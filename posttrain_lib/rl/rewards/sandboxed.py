"""The process in which an answer's program runs. Started by ``code``; what holds it in is said there.

    python -I -S -B <this file> <project root> <own folder>

reads a request (JSON) on standard input: ``program``, limits, and ``tests`` (a list of Python texts) or ``input`` (a
text). With tests, their outcomes go to standard output as a JSON list of bools, and what the program prints goes
nowhere. With an input, the program reads it and prints as any program does.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWPID, _SET_DEATH_SIGNAL = 0x20000000, 1
_NAME = "answer.py"


def run_tests(program: str, tests: list[str]) -> list[bool]:
    """Whether each test, behind the program, raises nothing. The program is no ``__main__``."""
    names: dict[str, Any] = {"__name__": "answer"}
    if not _runs(program, names):
        return [False] * len(tests)
    return [_runs(test, dict(names)) for test in tests]


def _runs(text: str, names: dict[str, Any]) -> bool:
    try:
        exec(compile(text, _NAME, "exec"), names)
    except BaseException:  # whatever a program raises, SystemExit too, it has not passed
        return False
    return True


def run_program(program: str) -> None:
    """Run it as ``__main__``; its exit status is this process's."""
    try:
        exec(compile(program, _NAME, "exec"), {"__name__": "__main__"})
        code: object = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
    sys.stdout.flush()
    os._exit(0 if code in (0, None) else 1)


def with_own_processes() -> None:
    """Go on as the first process of a namespace that the kernel empties at its end, where this user may have one."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWPID) != 0:
        return
    inner = os.fork()
    if inner == 0:
        library.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(inner, 0)
    os._exit(0 if status == 0 else 1)


def give_input(text: str) -> None:
    """Make a text what standard input reads."""
    file = os.memfd_create("input")
    with os.fdopen(file, "wb", closefd=False) as out:
        out.write(text.encode())
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)


def main() -> None:
    """Answer the one request."""
    root, folder = sys.argv[1:3]
    sys.path.insert(0, root)
    from posttrain_lib.conversion.confine import limit_resources, shut_in

    sys.path.remove(root)
    sys.argv = [_NAME]
    request = json.loads(sys.stdin.buffer.read())
    reply, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    if "tests" in request:
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
    else:
        give_input(request["input"])
    shut_in(Path(folder))
    with_own_processes()
    limit_resources(seconds=request["seconds"], memory_bytes=request["memory_bytes"], file_bytes=request["file_bytes"])
    if "tests" not in request:
        run_program(request["program"])
    outcomes = run_tests(request["program"], request["tests"])
    os.write(reply, json.dumps(outcomes).encode())
    os._exit(0)  # no handler that the program left behind


if __name__ == "__main__":
    main()
