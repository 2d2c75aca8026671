"""Programs against tests: right, wrong, and up to no good."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.errors import DataError
from posttrain_lib.rl.rewards import sandboxed
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict
from posttrain_lib.rl.rewards.code import Code, last_program
from posttrain_lib.rl.rewards.pool import GraderPool
from tests.support.graders import answer

RIGHT, WRONG = Verdict(1.0, True), Verdict(0.0, False)
ADD = "def add(a, b):\n    return a + b\n"
ADD_TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
ECHO = {"input": "2 3\n4\n", "output": "5\n4\n"}


@pytest.fixture
def code() -> Code:
    # a busy machine may take long to start an interpreter
    return Code(seconds=60.0)


def fenced(program: str, language: str = "python") -> str:
    return f"Thus:\n```{language}\n{program}\n```\nDone."


@pytest.mark.parametrize("language", ["python", "py", "Python3", ""])
def test_python_tests(code: Code, language: str) -> None:
    assert code(answer(fenced(ADD, language), tests=ADD_TESTS)) == RIGHT


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b",
        "def add(a, b:",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit()",
        "print('[true, true]')\nimport os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import ctypes\nctypes.string_at(0)",
        "x = bytearray(4 << 30)",
        "import os\nfor n in range(1, 99):\n    try: os.write(n, b'[true, true]')\n    except OSError: pass\n"
        "os._exit(0)",
        "import os\nfor n in range(1, 99):\n    try: os.write(n, b'11')\n    except OSError: pass",
        "import __main__\n__main__._runs = __main__.passes = lambda code, names: True",
        "import builtins\nbuiltins.exec = lambda *_: None",
        "import builtins\nbuiltins.compile = lambda *_: ''",
        "import json\njson.dumps = lambda _: '[true, true]'",
        "def add(a, b):\n    return add(a, b)",
    ],
)
def test_programs_that_are_wrong(code: Code, program: str) -> None:
    assert code(answer(fenced(program), tests=ADD_TESTS)) == WRONG


def test_the_last_block_counts_and_one_must_be_there(code: Code) -> None:
    assert code(answer(fenced("def add(a, b): ...") + fenced(ADD), tests=ADD_TESTS)) == RIGHT
    assert code(answer(fenced(ADD) + fenced("def add(a, b): ..."), tests=ADD_TESTS)) == WRONG
    assert code(answer(ADD, tests=ADD_TESTS)) == WRONG
    assert code(answer("```python\n" + ADD, tests=ADD_TESTS)) == WRONG


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```bash\npip install x\n```\nThen:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```cpp\nint x;\n```\nor\n```py\nx = 1\n```\nwhich prints\n```text\n1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2\n"),
        ('```python title="a.py"\nx = 1\n```', "x = 1\n"),
        ("1. So:\n   ```python\n   if x:\n       y = 1\n   ```\n", "if x:\n    y = 1\n"),
        ("```java\nint x;\n```\n", None),
        ("```java\nint x;\n```\nDone.\n```", None),
        ("no block, ```python here\nx``` either", None),
    ],
)
def test_blocks_of_other_languages_are_passed_over(text: str, program: str | None) -> None:
    assert last_program(text) == program


MODERN = """
from __future__ import annotations
import pickle
from dataclasses import dataclass
@dataclass
class Sum:
    value: int
def add(a, b):
    return pickle.loads(pickle.dumps(Sum(a + b))).value
"""


def test_a_programs_module_is_one_that_is_imported(code: Code) -> None:
    """As dataclasses and pickle look it up."""
    assert code(answer(fenced(MODERN), tests=ADD_TESTS)) == RIGHT
    assert code(answer(fenced(MODERN + "print(add(2, 3), 4, sep='\\n')"), tests=[ECHO])) == RIGHT


@pytest.mark.parametrize(
    "program",
    [
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('5\\n4'))).start()",
        "import atexit\natexit.register(print, '5\\n4')",
        "import sys\nprint('5\\n4')\nsys.stdout.close()",
        "import sys\nprint('5\\n4')\nsys.exit(False)",
    ],
)
def test_a_program_ends_as_any_other(code: Code, program: str) -> None:
    assert code(answer(fenced(program), tests=[ECHO])) == RIGHT


@pytest.mark.parametrize("end", ["raise SystemExit('no')", "exit(2)", "raise KeyboardInterrupt", "1 / 0"])
def test_a_program_that_ends_badly_is_wrong(code: Code, end: str) -> None:
    assert code(answer(fenced(f"print('5\\n4', flush=True)\n{end}"), tests=[ECHO])) == WRONG


def test_input_and_output(code: Code) -> None:
    program = "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())), ' ')\n"
    assert code(answer(fenced(program), tests=[ECHO])) == RIGHT
    assert code(answer(fenced("print(sum(map(int, input().split())))\nexit()"), tests=[ECHO])) == WRONG
    assert code(answer(fenced(program + "raise ValueError"), tests=[ECHO])) == WRONG
    assert code(answer(fenced("if __name__ == '__main__':\n    print('5\\n4')\n    exit()"), tests=[ECHO])) == RIGHT


def test_shares() -> None:
    code = Code(partial=True, seconds=60.0)
    half = answer(fenced("def add(a, b):\n    return 3"), tests=[*ADD_TESTS, *ADD_TESTS])
    assert code(half) == Verdict(0.5, False)
    assert Code(tests=[*ADD_TESTS, ECHO], partial=True, seconds=60.0)(answer(fenced(ADD))) == Verdict(2 / 3, False)


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(3600)"])
def test_programs_that_never_end_are_wrong(program: str) -> None:
    code = Code(seconds=1.0)
    assert code(answer(fenced(program), tests=ADD_TESTS)) == WRONG
    assert code(answer(fenced(program), tests=[ECHO])) == WRONG


def test_more_output_than_is_read(code: Code) -> None:
    flood = "while True: print('x' * 10000)"
    assert code(answer(fenced(flood), tests=[ECHO])) == WRONG


def test_what_a_program_sees_of_its_surroundings(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "xyzzy")
    program = (
        "import os, sys, importlib.util\n"
        "seen = dict(os.environ)\n"
        "here = os.listdir('.')\n"
        "packages = importlib.util.find_spec('numpy')\n"
        "arguments = sys.argv\n"
    )
    tests = [
        "assert 'SECRET' not in seen",
        "assert here == []",
        "assert packages is None",
        "assert len(arguments) == 1",
    ]
    assert code(answer(fenced(program), tests=tests)) == RIGHT


def test_what_the_kernel_keeps_a_program_from(code: Code, tmp_path: Path) -> None:
    """Where it does; what is in force is for the kernel to say, as ``conversion.confine`` reports it."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import socket\n"
            "def reached():\n"
            f"    socket.create_connection(('127.0.0.1', {port}), timeout=10)\n"
            "def written():\n"
            f"    open({str(victim)!r}, 'w').write('torn')\n"
            "def own():\n"
            "    open('mine', 'w').write('x')\n"
            "def fails(act):\n"
            "    try:\n        act()\n    except OSError:\n        return True\n"
        )
        layers = confined(tmp_path)
        if not any("network" in layer for layer in layers) or not any("Landlock" in layer for layer in layers):
            pytest.skip(f"this kernel lets this user have only: {layers}")
        tests = ["assert fails(reached)", "assert fails(written)", "own()"]
        assert code(answer(fenced(program), tests=tests)) == RIGHT
    assert victim.read_text() == "whole"


def confined(folder: Path) -> list[str]:
    """The layers that a process gets here."""
    import subprocess
    import sys

    program = (
        "import pathlib, sys\nfrom posttrain_lib.conversion.confine import shut_in\n"
        "print(*shut_in(pathlib.Path(sys.argv[1])), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_processes_of_a_program_end_with_it(tmp_path: Path) -> None:
    """Daemons, too: by the namespace, and where there is none by the grading process's keeper."""
    fork = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3600)\n    os._exit(0)\n"
        "os.wait()\n" + ADD
    )
    pool = GraderPool([RewardSpec("code", "code", options={"seconds": 60.0}, deadline_seconds=100.0)], workers=1)
    try:
        before = processes()
        pool.grade([answer(fenced(fork), tests=ADD_TESTS)])
        assert not [pid for pid in processes() - before if "sandboxed" in command(pid)]
    finally:
        pool.close()


def test_a_program_that_is_stopped_is_gone_with_its_verdict() -> None:
    """Else its grading process would be ended for it, too, and counted."""
    pool = GraderPool([RewardSpec("code", "code", options={"seconds": 0.3}, deadline_seconds=100.0)], workers=1)
    try:
        grades = pool.grade([answer(fenced("while True: pass"), tests=ADD_TESTS)] * 6)
        assert [grade.reward for grade in grades] == [0.0] * 6 and not pool.counts
    finally:
        pool.close()


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("tests", [None, [], "assert True", [1], [{"input": "a"}], [{"input": "a", "output": 1}]])
def test_rows_without_tests_that_can_be_run(code: Code, tests: object) -> None:
    with pytest.raises(DataError, match="test"):
        code(answer(fenced(ADD), tests=tests))


@pytest.mark.parametrize("tests", [ADD_TESTS, [ECHO]])
def test_a_sandbox_that_fails_is_no_wrong_answer(
    code: Code, tests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine lets it start no process."""
    broken = tmp_path / "sandboxed.py"
    text = Path(sandboxed.__file__).read_text(encoding="utf-8")
    broken.write_text(text.replace("os.fork()", "os.open('/no such file', 0)"), encoding="utf-8")
    monkeypatch.setattr("posttrain_lib.rl.rewards.code._PROGRAM", broken)
    with pytest.raises(DataError, match="the sandbox failed"):
        code(answer(fenced(ADD), tests=tests))
