"""The process in which an answer's program runs. Started by ``code``; what holds it in is said there.

    python -I -S -B <this file> <project root> <own folder>

reads a request (JSON) on standard input: ``program``, limits, and ``tests`` (a list of Python texts) or ``input`` (a
text). With tests, the request's ``seal`` and behind it 1 or 0 for each go to standard output, and what the program
prints goes nowhere. With an input, the program reads it and prints as any program does.
"""

import builtins
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_CLONE_NEWPID, _SET_DEATH_SIGNAL = 0x20000000, 1
_NAME = "answer.py"
#: the exit status of a run whose program did not come to a good end; any other but 0 is of what runs it
WRONG = 42


def run_tests(program: str, tests: list[str]) -> list[bool]:
    """Whether each test, behind the program, raises nothing. The program is no ``__main__``."""
    first, *others = map(_compiled, (program, *tests))
    # What these are called is the program's to change.
    run, copy = exec, dict

    def passes(code: CodeType | None, names: dict[str, Any]) -> bool:
        if code is None:
            return False
        try:
            run(code, names)
        except BaseException:  # whatever a program raises, SystemExit too, it has not passed
            return False
        return True

    names = module_of_program("answer")
    if not passes(first, names):
        return [False] * len(tests)
    return [passes(other, copy(names)) for other in others]


def _compiled(text: str) -> CodeType | None:
    try:
        return compile(text, _NAME, "exec")
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return None


def run_program(program: str) -> None:
    """Run it as ``__main__``; it ends as any program does, when its threads have ended, too."""
    # Programs of contests end with these, which site gives to interpreters that have it.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    exec(compile(program, _NAME, "exec"), module_of_program("__main__"))


def module_of_program(name: str) -> dict[str, Any]:
    """Names of a module that is imported, as pickle and dataclasses ask of it; and in this one's place."""
    sys.modules[name] = sys.modules["__main__"] = ModuleType(name)
    return vars(sys.modules[name])


def fork_and_watch(seconds: float) -> None:
    """Go on in a process that has ``seconds``; this one watches it, and ends with ``WRONG`` where that fails.

    Where the kernel lets this user have one, it is the first process of a namespace, which ends with it as a whole.
    None of it is left when this process ends.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.unshare(_CLONE_NEWPID)  # of what is forked from here on; where it may not be, the group is what is killed
    inner = os.fork()
    if inner == 0:
        os.setsid()
        library.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        return
    in_time = bool(select.select([os.pidfd_open(inner)], [], [], seconds)[0])
    with contextlib.suppress(ProcessLookupError):  # it has no group yet
        os.killpg(inner, signal.SIGKILL)
    os.kill(inner, signal.SIGKILL)
    _, status = os.waitpid(inner, 0)
    os._exit(0 if in_time and status == 0 else WRONG)


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
    fork_and_watch(request["seconds"])
    limit_resources(
        seconds=max(1, round(request["seconds"])),
        memory_bytes=request["memory_bytes"],
        file_bytes=request["file_bytes"],
    )
    if "tests" not in request:
        os.close(reply)
        run_program(request["program"])
        return
    write, end = os.write, os._exit
    outcomes = run_tests(request["program"], request["tests"])
    write(reply, (request["seal"] + "".join("01"[outcome] for outcome in outcomes)).encode())
    end(0)  # no handler that the program left behind


if __name__ == "__main__":
    main()
