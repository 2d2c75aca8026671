"""The engine's process from outside: answers, tensors, and every way to fall silent."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest
import torch

from posttrain_lib.adapters.vllm_channel import Channel
from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.sync_guard import digest_of

#: seconds for an answer that comes
LONG = 60.0


@pytest.fixture
def channel() -> Iterator[Channel]:
    channel = Channel("tests.support.answering", {})
    yield channel
    channel.close()


def test_calls_are_answered_and_errors_are_answers(channel: Channel) -> None:
    assert channel.call("a", 1, [2], seconds=LONG) == ("a", (1, [2]))
    with pytest.raises(RolloutError, match="refused") as error:
        channel.call("refuse", seconds=LONG)
    assert error.value.where == "here"
    assert channel.call("b", seconds=LONG) == ("b", ())


def test_what_cannot_be_sent_harms_nothing(channel: Channel) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        channel.call("a", lambda: None, seconds=LONG)
    assert channel.call("b", seconds=LONG) == ("b", ())


def test_a_call_that_was_interrupted_leaves_no_answer_for_the_next(channel: Channel) -> None:
    """The answer of the first would be taken for the second's."""
    channel.call("a", seconds=LONG)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            channel.call("hang", seconds=LONG)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RolloutError, match="a call was broken off: 'hang'"):
        channel.call("a", seconds=LONG)
    os.kill(channel.pid, signal.SIGKILL)


def test_tensors_arrive_as_they_are(channel: Channel) -> None:
    """Views, odd sizes, several dtypes; a second push over the first takes no more memory."""
    weights = {
        "view": torch.arange(12.0).reshape(3, 4).t(),
        "odd": torch.randn(7).bfloat16(),
        "none": torch.tensor(3, dtype=torch.int64),
        "half": torch.randn(5, 3).half(),
        "large": torch.randn(1000, 100, dtype=torch.float64),
    }
    assert channel.push("digest", weights.items(), seconds=LONG) == digest_of(weights.items())
    size = channel.call("size", seconds=LONG)
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    assert channel.push("digest", changed.items(), seconds=LONG) == digest_of(changed.items())
    assert channel.call("size", seconds=LONG) == size


def broken(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """They end with an error of the driver's."""
    yield from weights
    raise ValueError("no more")


def test_a_push_that_ends_in_an_error_harms_no_later_one(channel: Channel) -> None:
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    with pytest.raises(RolloutError, match="enough"):
        channel.push("half", weights.items(), seconds=LONG)
    with pytest.raises(ValueError, match="no more"):
        channel.push("digest", broken(weights.items()), seconds=LONG)
    assert channel.push("digest", weights.items(), seconds=LONG) == digest_of(weights.items())


@pytest.mark.parametrize(
    ("what", "words"),
    [("crash", r"exit code 1 at 'crash'[\s\S]*a last word[\s\S]*of its own"), ("killed", "exit code -9 at 'killed'")],
)
def test_a_death_is_an_error_with_its_last_words(channel: Channel, what: str, words: str) -> None:
    for call in (what, "a"):  # and so is every call afterwards
        with pytest.raises(RolloutError, match=words):
            channel.call(call, seconds=LONG)


def test_an_answer_that_is_too_late_ends_the_process(channel: Channel) -> None:
    channel.call("a", seconds=LONG)
    for call in ("hang", "a"):
        with pytest.raises(RolloutError, match=r"no answer to 'hang' in 0\.1 s"):
            channel.call(call, seconds=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(channel.pid, 0)


def test_a_process_that_stops_within_a_message_is_ended(channel: Channel) -> None:
    """Where it does not read what is more than the pipe holds, and where its answer breaks off."""
    channel.call("a", seconds=LONG)
    os.kill(channel.pid, signal.SIGSTOP)
    with pytest.raises(RolloutError, match=r"no answer to 'a' in 0\.2 s"):
        channel.call("a", bytes(1 << 22), seconds=0.2)
    other = Channel("tests.support.answering", {})
    other.call("a", seconds=LONG)
    with pytest.raises(RolloutError, match=r"no answer to 'half an answer' in 1 s"):
        other.call("half an answer", seconds=1.0)
    other.close()


def test_a_process_that_has_shut_its_end_and_lives_on_is_ended(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain_lib.adapters.vllm_channel._GRACE", 0.2)
    with pytest.raises(RolloutError, match="exit code -9 at 'shut'"):
        channel.call("shut", seconds=LONG)


def test_the_process_ends_with_its_driver() -> None:
    """Also where the driver is killed: its end of the pipe is gone then."""
    driver = (
        "import os; from posttrain_lib.adapters.vllm_channel import Channel\n"
        "channel = Channel('tests.support.answering', {}); channel.call('a', seconds=60)\n"
        "print(channel.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", driver], stdout=subprocess.PIPE, check=False, timeout=LONG)
    assert ended.returncode == -9
    try:
        left = os.pidfd_open(int(ended.stdout))
    except ProcessLookupError:
        return  # gone already
    # readable once the process is gone
    assert select.select([left], [], [], LONG)[0], "it lives on"
    os.close(left)
