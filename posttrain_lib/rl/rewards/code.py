"""Reward ``code``: the answer's program passes the row's tests, each run in a sandbox.

``extra["tests"]`` of the row is a list. A text is Python that runs behind the program and raises where it is wrong
(MBPP, HumanEval). ``{"input": ..., "output": ...}`` is a run of the program: what it reads and what it must print,
white space at the ends of lines aside (APPS, CodeContests).

**What the sandbox holds.** ``sandboxed.py`` runs the program in an interpreter of its own, without this environment's
variables and packages (``-I -S``), in an empty folder that is removed behind it, with limits of processor time, memory
and size of files, and without further processes or threads unless it runs as root. Where the kernel lets this user: in
namespaces without network, whose processes all end together, and with writing confined to the folder (Landlock).

**What it does not.** The program can read what this user can read. Without namespaces it reaches the network and may
send signals to this user's processes. As root it may start processes until its time is up. A test that is Python shares
the interpreter with the program, so a program made to deceive it can pass it; one that is input and output is compared
outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, module_file
from posttrain_lib.rl.rewards.base import Verdict
from posttrain_lib.rl.rewards.sandboxed import WRONG
from posttrain_lib.schema.rollouts import Answer

#: by its name, so that a step's source digest finds it
_PROGRAM = module_file("posttrain_lib.rl.rewards.sandboxed")
#: of any language: the fence that ends one is else taken for the beginning of another
_BLOCK = re.compile(r"^([ \t]*)```[ \t]*([^\s`]*)[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"python", "python3", "py"})
#: what an interpreter needs before a program has done anything
_INTERPRETER_BYTES = 256 << 20
#: what a busy machine may take to start an interpreter, and to end a program; no time of the program
_START_SECONDS = 20.0


class Code:
    """1 where the last Python block of the answer passes all tests, else 0; so for an answer without a block. Blocks
    that name no language are Python where no other is.

    ``deadline_seconds`` of the reward should be above ``seconds`` times the runs: one for each test that is input and
    output, one for all others. What outlasts ``seconds`` is wrong, what outlasts the deadline is a failure.

    Args:
        tests: instead of the row's own.
        seconds: wall-clock time of a run; of processor time, at least 1.
        memory_gib: address space of a run.
        file_mib: size of a file that it writes, and of what it prints.
        partial: the share of the tests that pass, in place of 0 or 1.

    Raises:
        ConfigError: limits that are not above 0.
    """

    def __init__(
        self,
        tests: Sequence[str | Mapping[str, str]] | None = None,
        seconds: float = 4.0,
        memory_gib: float = 1.0,
        file_mib: float = 1.0,
        partial: bool = False,
    ) -> None:
        if min(seconds, memory_gib, file_mib) <= 0:
            raise ConfigError(
                "a program needs some time, memory and room",
                where="rewards: code",
                got=f"seconds {seconds}, memory_gib {memory_gib}, file_mib {file_mib}",
            )
        self._tests, self._seconds, self._partial = tests, seconds, partial
        self._limits = {
            "seconds": seconds,
            "memory_bytes": _INTERPRETER_BYTES + int(memory_gib * 2**30),
            "file_bytes": int(file_mib * 2**20),
        }

    def __call__(self, answer: Answer) -> Verdict:
        """DataError where the row has no tests, or some that are neither text nor input and output."""
        tests = answer.extra.get("tests") if self._tests is None else self._tests
        asserts, runs = _sorted(tests)
        program = last_program(answer.text)
        if program is None:
            return Verdict(0.0, False)
        passed = self._passed_asserts(program, asserts) if asserts else 0
        for run in runs:
            printed = self._run({"program": program, "input": run["input"]})
            passed += printed is not None and _lines(printed) == _lines(run["output"])
        share = passed / (len(asserts) + len(runs))
        return Verdict(share if self._partial else float(share == 1), share == 1)

    def _passed_asserts(self, program: str, asserts: Sequence[str]) -> int:
        # Known to none but the sandbox: what a program writes wherever it can is no outcome.
        seal = secrets.token_hex()
        said = self._run({"program": program, "tests": list(asserts), "seal": seal}) or ""
        outcomes = said.removeprefix(seal)
        return outcomes.count("1") if len(said) == len(seal) + len(asserts) and outcomes != said else 0

    def _run(self, request: dict[str, Any]) -> str | None:
        """What the program printed, or its sealed outcomes; None where it did not come to its end in time.

        Raises:
            DataError: the sandbox itself failed: nothing is known of the program.
        """
        prefix = "answer-"
        with (
            tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as out,
        ):
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_PROGRAM), str(PROJECT_ROOT), folder],
                cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
                stdin=subprocess.PIPE,
                stdout=out,  # a file, whose size is limited: a pipe would have to be read
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                child.communicate(
                    json.dumps({**request, **self._limits}).encode(), timeout=self._seconds + _START_SECONDS
                )
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(child)
            # A signal may be the program's doing; of the statuses only these two are the watcher's word.
            if child.returncode > 0 and child.returncode != WRONG:
                raise DataError("the sandbox failed before the program ran", got=f"exit {child.returncode}")
            out.seek(0)
            return out.read().decode(errors="replace") if child.returncode == 0 else None


def last_program(text: str) -> str | None:
    """The last block of Python, else the last that names no language; less the indentation of its fence."""
    blocks: dict[bool, str] = {}
    for indent, language, block in _BLOCK.findall(text):
        if not language or language.lower() in _PYTHON:
            blocks[bool(language)] = re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
    return blocks.get(True, blocks.get(False))


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _sorted(tests: Any) -> tuple[list[str], list[Mapping[str, str]]]:
    """(those that are Python, those that are input and output)."""
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise DataError("the row has no tests", where="extra: tests", got=repr(tests)[:200], expected="a list of them")
    asserts = [test for test in tests if isinstance(test, str)]
    runs = [test for test in tests if isinstance(test, Mapping)]
    bad = [test for test in tests if not isinstance(test, str | Mapping)]
    bad += [run for run in runs if not all(isinstance(run.get(name), str) for name in ("input", "output"))]
    if bad:
        raise DataError(
            "a test that cannot be run",
            where="extra: tests",
            got=repr(bad[0])[:200],
            expected="Python as a text, or {input: text, output: text}",
        )
    return asserts, runs


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
