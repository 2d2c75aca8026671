"""What the driver of the vLLM engine makes of sampled tokens, without vLLM."""

from __future__ import annotations

import pytest

from posttrain_lib.adapters.vllm_engine import VllmEngine
from posttrain_lib.adapters.vllm_worker import Sampled
from posttrain_lib.errors import RolloutError
from posttrain_lib.schema.rollouts import Completion
from tests.support.engines import request


class Scripted:
    """The process's place: each step gives what it was told."""

    def __init__(self, *steps: list[Sampled]) -> None:
        self.steps, self.left = list(steps), list[str]()

    def call(self, what: str, *arguments: list[str], seconds: float) -> object:
        if what == "abort":
            self.left += arguments[0]
        return (self.steps.pop(0), {}) if what == "step" else None


def run(*steps: list[Sampled], new_tokens: int = 8) -> tuple[list[Completion], list[str]]:
    """(completions of request "a", which requests vLLM was told to leave)."""
    engine = VllmEngine.__new__(VllmEngine)
    engine._window, engine._vocab_size, engine._seconds = 64, 99, 1.0
    engine._decode = lambda tokens: "".join(map(chr, tokens))
    engine._running, engine._failed, engine._ended = {}, {}, {}
    engine._channel = scripted = Scripted(*steps)  # type: ignore[assignment]
    engine.submit([request("a", [1], new_tokens, stop_strings=("BC",), stop_ids=frozenset({90}))])
    return [done for _ in steps for done in engine.step()], scripted.left


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (4,), (2, 4), (3, 4)])
def test_tokens_behind_a_stop_string_are_nobodys(cuts: tuple[int, ...]) -> None:
    """However many come with one step: A, B, C, and D behind the end."""
    places = list(zip((0, *cuts), cuts, strict=False))
    steps = [[Sampled("a", [65, 66, 67, 68][i:j], [-1.0, -2.0, -3.0, -4.0][i:j], 3, None)] for i, j in places]
    (done,), left = run(*steps)
    assert done.token_ids.tolist() == [65, 66, 67] and done.logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert done.finish == "stop" and done.versions.tolist() == [3, 3, 3] and left == ["a"]


def test_an_end_that_is_vllms_own_is_an_error() -> None:
    (done,), left = run([Sampled("a", [65, 90], [-1.0, -1.0], 0, "stop")])
    assert done.token_ids.tolist() == [65, 90] and left == []
    with pytest.raises(RolloutError, match="ended a request by itself"):
        run([Sampled("a", [65], [-1.0], 0, "length")])
