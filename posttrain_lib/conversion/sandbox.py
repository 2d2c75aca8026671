"""Running a proposal in a process of its own, under limits, and taking out of it nothing but data."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_lib.conversion.family_file import objections
from posttrain_lib.conversion.spec_data import FamilyData, family_data
from posttrain_lib.errors import ModelError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, module_file

#: by its name, so that a step's source digest finds it
_PROGRAM = module_file("posttrain_lib.conversion.candidate")
_LARGEST_ANSWER = 32 << 20
#: what the interpreter and the project's own modules need before a proposal has done anything
_INTERPRETER_BYTES = 512 << 20
#: what a busy machine may take to start an interpreter; no time of the proposal
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """What one attempt may use. ``seconds`` and ``memory_gib`` hold for the proposal; the gate has its own."""

    seconds: float = 20.0
    memory_gib: float = 1.0
    gate_seconds: float = 600.0
    gate_memory_gib: float | None = None


@dataclass(frozen=True)
class SandboxResult:
    """``family`` or ``error``, one of them; ``outcome``: "read", "refused", "failed", "timeout", "killed"."""

    outcome: str
    seconds: float
    family: FamilyData | None = None
    error: str | None = None
    layers: tuple[str, ...] = ()


def run_proposal(
    text: str,
    config: Mapping[str, Any],
    *,
    limits: Limits,
    families: Collection[str] = (),
    removed: Collection[str] = (),
    check_text: bool = True,
) -> SandboxResult:
    """What a family file makes of a config.json.

    Args:
        text: source of the family file.
        config: config.json's content, without what names the family.
        families: modules of other families that it may build on; ``removed``: those that it must not find.
        check_text: False leaves :func:`~posttrain_lib.conversion.family_file.objections` out: the sandbox has to hold
            by itself, and tests see to that.
    """
    begin = time.monotonic()
    if check_text and (found := objections(text, families)):
        return SandboxResult("refused", time.monotonic() - begin, error="\n".join(found[:20]))
    request = {
        "text": text,
        "config": dict(config),
        "removed": sorted(removed),
        "seconds": max(1, round(limits.seconds)),
        "memory_bytes": _INTERPRETER_BYTES + int(limits.memory_gib * 2**30),
    }
    with tempfile.TemporaryDirectory(prefix="proposal-") as folder:
        outcome, answer = _run(request, folder, limits.seconds)
    seconds = time.monotonic() - begin
    layers = tuple(map(str, answer.get("layers", ())))
    if "family" in answer:
        try:
            return SandboxResult("read", seconds, family_data(answer["family"]), layers=layers)
        except ModelError as error:
            answer = {"error": str(error)}
    return SandboxResult(outcome, seconds, error=str(answer.get("error")), layers=layers)


def _run(request: dict[str, Any], folder: str, seconds: float) -> tuple[str, dict[str, Any]]:
    """(outcome, answer) of the child."""
    command = [sys.executable, "-I", "-B", str(_PROGRAM), str(PROJECT_ROOT), folder]
    # No variable of this process: keys and paths are none of a proposal's business.
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        said = _talk(child, json.dumps(request).encode(), seconds)
    finally:
        _stop(child)
    if said is None:
        return "timeout", {"error": f"the proposal was stopped after {seconds:g} seconds"}
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout", {"error": f"the proposal used up its {seconds:g} seconds of processor time"}
    if child.returncode != 0 or len(said) > _LARGEST_ANSWER:
        return "killed", {"error": f"the proposal's process ended with {child.returncode} and no answer"}
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    return "failed", answer if isinstance(answer, dict) else {"error": "the proposal's process gave no answer"}


def _talk(child: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes | None:
    """What the child says until it ends; None where its time is up, which begins with the first byte."""
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(request)
    said, deadline = b"", time.monotonic() + _START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([child.stdout], [], [], left)[0]:
            continue
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part or len(said) > _LARGEST_ANSWER:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is stopped then
                child.wait(max(0.1, deadline - time.monotonic()))
            return said
        if not said:
            deadline = time.monotonic() + seconds
        said += part
    return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group, whatever it left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
