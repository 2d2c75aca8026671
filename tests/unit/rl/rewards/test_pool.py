"""Grading processes: each fault costs its answer only, is counted by reason, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.rewards.pool import GraderPool
from posttrain_lib.rl.rewards.process import Failure, GradingProcess
from posttrain_lib.schema.rollouts import Grade
from posttrain_lib.training import pulse
from tests.support.graders import answer

OBEY = RewardSpec("tests.support.graders:obey", "it", deadline_seconds=60.0, memory_gib=0.5)
#: for graders that never come back; long enough for one that does, on a busy machine
SHORT = RewardSpec("tests.support.graders:obey", "it", deadline_seconds=4.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    made = GraderPool([OBEY], workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def short_pool() -> Iterator[GraderPool]:
    made = GraderPool([SHORT], workers=1)
    yield made
    made.close()


def failure_among_good(pool: GraderPool, text: str, **extra: str) -> tuple[str | None, dict[str, int]]:
    """The failure of one answer between two good ones, and what was counted."""
    before = pool.counts.copy()
    first, found, last = pool.grade([answer("3"), answer(text, **extra), answer("4")])
    assert first == Grade(3.0, {"it": 3.0}) and last == Grade(4.0, {"it": 4.0})
    assert (found.reward is None) == (found.failure is not None)
    return found.failure, dict(pool.counts - before)


FAILURES = {
    "exit": "process ended (exit 0)",
    "segfault": "process ended (SIGSEGV)",
    "close all": "process ended",
    "scribble": "process ended (no reply that can be read)",
    "sys.exit": "raised SystemExit (0)",
    "raise": "raised ValueError (no good)",
    "interrupt": "raised KeyboardInterrupt",
    "unspeakable": "raised Unspeakable (its message cannot be read: RuntimeError)",
    "unpicklable": "raised Unpicklable (no? word word ",
    "hog": "raised MemoryError",
    "nan": "gave no number (gave nan, not a finite number)",
    "inf": "gave no number (gave -inf, not a finite number)",
    "huge": "gave no number (gave inf, not a finite number)",
    "text": "gave no number (gave a str, not a number)",
    "none": "gave no number (gave a NoneType, not a number)",
    "bool": "gave no number (gave a bool, not a number)",
    "list": "gave no number (gave a list, not a number)",
    "complex": "gave no number (gave a complex, not a number)",
    "nan verdict": "gave no number (gave nan, not a finite number)",
    "false verdict": "gave no number (gave a str for whether the answer is right)",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_fault_costs_its_answer_only(pool: GraderPool, text: str) -> None:
    failure, counted = failure_among_good(pool, text)
    assert failure is not None and failure.startswith(f"it: {FAILURES[text]}") and len(failure) < 600
    assert counted == {f"it: {FAILURES[text].partition(' (')[0]}": 1}


@pytest.mark.parametrize("text", ["print", "fork and answer twice"])
def test_what_is_no_fault(pool: GraderPool, text: str) -> None:
    assert failure_among_good(pool, text) == (None, {})


def test_a_grader_that_never_comes_back(short_pool: GraderPool) -> None:
    failure, counted = failure_among_good(short_pool, "sleep")
    assert failure == "it: deadline (stopped after 4 seconds)" and counted == {"it: deadline": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("leave processes", "left processes running"),
        ("fork and sleep", "deadline"),
        ("fork and exit", "process ended"),
    ],
)
def test_no_process_survives_its_answer(
    pool: GraderPool, short_pool: GraderPool, text: str, reason: str, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    _, counted = failure_among_good(short_pool if reason == "deadline" else pool, text, told=str(told))
    assert counted == {f"it: {reason}": 1}
    processes = [int(line) for line in told.read_text().split()]
    assert len(processes) == 2 and not any(runs(pid) for pid in processes)


def test_no_grading_survives_its_keeper(pool: GraderPool, tmp_path: Path) -> None:
    told = tmp_path / "told"
    failure, counted = failure_among_good(pool, "kill keeper", told=str(told))
    assert failure == "it: keeper ended" and counted == {"it: keeper ended": 1}
    await_ends([int(told.read_text())])


@pytest.mark.parametrize("said", [b"", b"\t\0", b"\t\0\0\0", b"\t\0\0\0R[", b"\t\0\0\0X"])
def test_a_frame_that_breaks_off_is_the_keepers_end(said: bytes) -> None:
    """As where it is killed while it writes."""
    process = GradingProcess(OBEY, 60.0)
    process.ready()
    whole, process._keeper.stdout = process._keeper.stdout, io.BytesIO(said)
    try:
        assert process.grade([answer("1")]) == (Failure("keeper ended"), False) and not process.is_open
    finally:
        process._keeper.stdout = whole
        process.close()


def test_no_process_survives_the_end(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    others = set(children(os.getpid()))
    pool = GraderPool([RewardSpec("tests.support.graders:obey", "it", deadline_seconds=600.0)])
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.extend(pool.grade([answer("fork and sleep", told=str(told))])))
    thread.start()
    processes = told_of(told)
    below = set(children(os.getpid())) - others
    assert below
    pool.close()
    thread.join()
    assert grades[0].failure == "it: keeper ended"
    assert not any(runs(pid) for pid in [*processes, *below])


TRAINER = """
import sys
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.rewards.pool import GraderPool
from tests.support.graders import answer
pool = GraderPool([RewardSpec("tests.support.graders:obey", "it", deadline_seconds=600.0)])
pool.grade([answer("fork and sleep", told=sys.argv[1])])
"""


def test_no_process_survives_a_killed_trainer(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(told)])
    processes = told_of(told)
    below = [pid for child in children(trainer.pid) for pid in (child, *children(child))]
    assert below
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    await_ends([*processes, *below])


def await_ends(processes: list[int]) -> None:
    """The kernel and the keeper do it, in their own time."""
    for pid in processes:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], 60)[0], "a process still runs after a minute"
        os.close(handle)


def told_of(fifo: Path) -> list[int]:
    """Two ids of processes, waited for."""
    found: list[int] = []
    while len(found) < 2:
        found += map(int, fifo.read_text().split())
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def test_a_light_grader_stays_light(pool: GraderPool) -> None:
    assert pool.grade([answer("modules")])[0].reward == 0.0


def test_a_grader_is_made_once_and_again_behind_a_crash() -> None:
    pool = GraderPool([RewardSpec("tests.support.graders:Counting", "n")], workers=1)
    try:
        assert [grade.reward for grade in pool.grade([answer("a")] * 3)] == [1.0, 2.0, 3.0]
        assert pool.grade([answer("a")])[0].reward == 4.0
    finally:
        pool.close()


def test_a_fork_from_the_making_answers_nothing() -> None:
    pool = GraderPool([RewardSpec("tests.support.graders:Forked", "it", deadline_seconds=60.0)], workers=1)
    try:
        grades = pool.grade([answer(str(number)) for number in range(9)])
    finally:
        pool.close()
    assert [grade.reward for grade in grades] == list(range(9)) and not pool.counts


def test_a_batch_that_fails_is_asked_one_by_one() -> None:
    spec = RewardSpec("tests.support.graders:Batched", "it", deadline_seconds=60.0)
    pool = GraderPool([spec], workers=4, batch=4)
    try:
        texts = (
            ["1"] * 4 + ["1", "exit", "1", "1"] + ["1", "raise", "nan", "1"] + ["1", "nan", "1", "1"] + ["too few", "1"]
        )
        grades = pool.grade([answer(text) for text in texts])
        assert [grade.reward for grade in grades] == [
            *[4.0] * 4, 1.0, None, 1.0, 1.0, 1.0, None, None, 1.0, 4.0, None, 4.0, 4.0, None, 1.0,
        ]  # fmt: skip
        assert pool.counts == {"it: process ended": 1, "it: raised ValueError": 1, "it: gave no number": 3}
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "ValueError: no good"),
        ("exit", "exit 0"),
        ("segfault", "SIGSEGV"),
        ("sys.exit", "SystemExit: 0"),
        ("sleep", "was not ready after 5 seconds"),
    ],
)
def test_a_grader_that_cannot_be_made_stops_the_start(how: str, said: str) -> None:
    broken = RewardSpec("tests.support.graders:Broken", "b", options={"how": how})
    # What never comes back costs its time; what does may take long on a busy machine.
    pool = GraderPool([broken], start_seconds=5.0) if how == "sleep" else GraderPool([OBEY, broken])
    with pytest.raises(ConfigError, match="the grader cannot be made") as caught:
        pool.check()
    assert caught.value.where == "rewards: b" and caught.value.got == said


def test_a_grader_that_cannot_be_made_again(tmp_path: Path) -> None:
    options = {"marker": str(tmp_path / "made")}
    pool = GraderPool([RewardSpec("tests.support.graders:OnceMade", "o", options=options)], workers=1)
    try:
        grades = pool.grade([answer("1"), answer("exit"), answer("2"), answer("3")])
    finally:
        pool.close()
    assert [grade.reward for grade in grades] == [1.0, None, None, None]
    assert pool.counts == {"o: process ended": 1, "o: grader cannot be made": 2}
    assert "FileExistsError" in str(grades[2].failure)


def test_what_cannot_be_sent(pool: GraderPool) -> None:
    first, second = pool.grade([answer("1", thing=lambda: None), answer("2")])  # type: ignore[arg-type]
    assert str(first.failure).startswith("it: cannot be sent to its process") and second.reward == 2.0


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "there is no reward"),
        ([OBEY, OBEY], "titles of their own"),
        ([RewardSpec("exact", "e", weight=float("nan"))], "a finite weight"),
        ([RewardSpec("exact", "e", deadline_seconds=0.0)], "limits above 0"),
        ([RewardSpec("exact", "e", memory_gib=-1.0)], "limits above 0"),
    ],
)
def test_specs_that_cannot_be(specs: list[RewardSpec], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GraderPool(specs)


@pytest.mark.parametrize("options", [{"workers": 0}, {"batch": 0}, {"start_seconds": 0.0}])
def test_pools_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="grading needs processes"):
        GraderPool([OBEY], **options)


def test_a_sum_that_is_too_large() -> None:
    pool = GraderPool([RewardSpec("tests.support.graders:obey", "it", weight=1e200)], workers=1)
    try:
        assert pool.grade([answer("1e200")])[0] == Grade(None, {"it": 1e200}, None, "the weighted sum is not finite")
    finally:
        pool.close()


def test_each_grading_is_a_sign_of_life(pool: GraderPool) -> None:
    """A batch of answers on which graders hang takes as many deadlines, and is no hang of the run."""
    before = pulse.current().beats
    pool.grade([answer("1"), answer("raise"), answer("2")])
    assert pulse.current().beats == before + 3
