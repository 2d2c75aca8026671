"""The grading process: one grader, made once, asked again and again. Started by ``keeper``.

    python -m posttrain_lib.rl.rewards.worker <request descriptor> <reply descriptor>

The first frame is a pickled ``RewardSpec``; it is answered with JSON once the grader is made, or with ``!`` and why it
cannot be. Every further one is a pickled list of ``Answer``, answered with JSON: for each ``{"value", "correct"}`` or
``{"failure", "detail"}``. Replies are JSON, not pickles: what a grader gives reaches the trainer as numbers and text.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain_lib.rl.rewards.base import Grader, RewardSpec, checked, make_grader

if TYPE_CHECKING:
    from posttrain_lib.schema.rollouts import Answer

_LONGEST_DETAIL = 500


def main(requests: int, replies: int) -> None:
    """Make the grader, then answer until the requests end."""
    me = os.getpid()
    with os.fdopen(requests, "rb") as source:
        spec: RewardSpec = pickle.loads(_read(source) or b"")
        try:
            grader = make_grader(spec)
        except BaseException as error:  # whatever a grader's class raises, SystemExit too
            _write(replies, b"!" + said(error).encode())
            return
        _end_fork(me)
        _limit_memory(spec.memory_gib)
        _write(replies, json.dumps({"batched": hasattr(grader, "grade_many")}).encode())
        while (request := _read(source)) is not None:
            outcomes = graded(grader, request)
            _end_fork(me)
            _write(replies, json.dumps(outcomes).encode())


def graded(grader: Grader, request: bytes) -> list[dict[str, Any]]:
    """An outcome for each answer; one ``{"failure"}`` alone where a call for several failed as a whole."""
    try:
        answers: Sequence[Answer] = pickle.loads(request)
        if not hasattr(grader, "grade_many"):
            return [outcome(grader(answer)) for answer in answers]
        found = list(grader.grade_many(answers))
        if len(found) != len(answers):
            return [_failure("gave no number", f"gave {len(found)} values for {len(answers)} answers")]
        return [outcome(one) for one in found]
    except BaseException as error:
        return [_failure(f"raised {type(error).__name__[:80]}", message_of(error))]


def outcome(given: object) -> dict[str, Any]:
    """What a grader gave, checked."""
    try:
        verdict = checked(given)
    except ValueError as error:
        return _failure("gave no number", str(error))
    return {"value": verdict.value, "correct": verdict.correct}


def said(error: BaseException) -> str:
    """Type and message."""
    return f"{type(error).__name__[:80]}: {message_of(error)}"


def message_of(error: BaseException) -> str:
    """One line, bounded. The error is not sent itself: it may hold what cannot be."""
    try:
        words = " ".join(str(error)[: 4 * _LONGEST_DETAIL].split())
    except Exception as second:
        words = f"its message cannot be read: {type(second).__name__}"
    return words[:_LONGEST_DETAIL].encode(errors="replace").decode()


def _failure(kind: str, detail: str) -> dict[str, Any]:
    return {"failure": kind, "detail": detail}


def _end_fork(me: int) -> None:
    """End a fork of the grader that came out here, too: it would answer beside the process that ``me`` is."""
    if os.getpid() != me:
        os._exit(0)


def _limit_memory(gib: float | None) -> None:
    """Bound the address space to what the process has and ``gib`` more. Not before: a model may be large."""
    if gib is None:
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = held + int(gib * 2**30)
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))


def _read(source: Any) -> bytes | None:
    head = source.read(4)
    if len(head) < 4:
        return None
    content: bytes = source.read(struct.unpack("<I", head)[0])
    return content


def _write(replies: int, content: bytes) -> None:
    rest = memoryview(struct.pack("<I", len(content)) + content)
    while rest:
        rest = rest[os.write(replies, rest) :]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    # No handler or thread of a grader holds up the end.
    os._exit(0)
