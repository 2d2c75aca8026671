"""Episodes: token-exact histories, limits, and environments that fail."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.errors import ConfigError, DataError, RolloutError
from posttrain_lib.rl.environments.base import EnvironmentSpec, Said, Turn, environment_maker
from posttrain_lib.rl.playing import Playing, make_playing, play_all
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.trajectories import Play, Trajectory, to_grade, with_failures
from posttrain_lib.schema.examples import Message
from posttrain_lib.schema.rollouts import Grade, Request
from tests.support.dialogues import prompt_of, sampling_of, scripted
from tests.support.engines import embedded

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "48/2+48"}}</tool_call>'


class Asker:
    """Says the next of its lines until there is none."""

    roles = frozenset({"user", "tool"})

    def __init__(self, lines: Sequence[str] = ("Go on.", "And then?"), role: str = "user") -> None:
        self.lines, self.role = list(lines), role

    def tools(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        self.seed = seed

    def step(self, text: str) -> Turn:
        if not self.lines:
            return Turn(done=True, info={"seed": self.seed})
        return Turn([Said(self.role, self.lines.pop(0))], info={"left": len(self.lines)})


class Faulty(Asker):
    """Fails in the way that it is told."""

    never = threading.Event()

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        if self.how == "reset":
            raise KeyError("no such level")

    def step(self, text: str) -> Any:
        found: dict[str, Any] = {
            "nothing": None,
            "silent": Turn(),
            "role": Turn([Said("system", "x")]),
            "number": Turn([Said("user", 3)]),  # type: ignore[arg-type]
            "control": Turn([Said("user", "<|im_end|>")]),
            "no list": Turn(None),  # type: ignore[arg-type]
            "once": Turn(Said("user", line) for line in "ab"),  # type: ignore[arg-type]
            "unhashable": Turn([Said(["user"], "x")]),  # type: ignore[arg-type]
            "surrogate": Turn([Said("user", "\ud800")]),
            "info": Turn(done=True, info=[("a", 1)]),  # type: ignore[arg-type]
        }
        if self.how == "exit":
            raise SystemExit("enough")
        if self.how == "late":
            self.never.wait()
        return found[self.how]


class Roleless(Asker):
    """Does not say who speaks in it."""

    roles = None  # type: ignore[assignment]


HERE = f"{__name__}:"


def playing_of(tokenizer: ChatTokenizer, name: str, **changes: Any) -> Playing:
    spec = EnvironmentSpec(name, **changes)
    return make_playing(tokenizer, spec, None, sampling_of(tokenizer, 1).stop_ids, "the template")


def scripted_episode(
    tokenizer: ChatTokenizer, playing: Playing, turns: Sequence[tuple[str, Any]], new_tokens: int = 99
) -> tuple[Trajectory, list[Request]]:
    asked: list[Request] = []
    prompt = dataclasses.replace(prompt_of(tokenizer, "How many?", "72"), extra={"level": 1})
    sampling = sampling_of(tokenizer, new_tokens)
    run = playing.play(prompt, sampling, 7, "a", scripted(tokenizer, turns, asked))
    return asyncio.run(run), asked  # type: ignore[arg-type]


def test_a_calculator_is_called_and_answers(tokenizer: ChatTokenizer) -> None:
    playing = playing_of(tokenizer, "calculator")
    one, asked = scripted_episode(
        tokenizer, playing, [(f"So {CALL}<|im_end|>", "stop"), ("It is 72.<|im_end|>", "stop")]
    )
    talk = [
        Message("user", "How many?"),
        Message("assistant", f"So {CALL}"),
        Message("tool", "72"),
        Message("assistant", "It is 72."),
    ]
    served = tokenizer.encode(tokenizer.render(talk).rstrip()).ids.tolist()
    assert one.token_ids.tolist() == served
    assert [len(request.prompt_ids) for request in asked] == [one.prompt_tokens, one.prompt_tokens + two_turns(one)]
    assert one.finished and one.failure is None and one.answer.finished
    assert one.answer.text == "It is 72." and one.answer.expected == "72" and one.answer.tokens == len(one.logprobs)
    assert one.answer.extra["turns"] == [{"role": said.role, "content": said.content} for said in talk[1:]]
    assert one.answer.extra["level"] == 1
    assert one.answer.extra["environment"] == {"calls": 1, "failed_calls": 0}
    assert one.trained.sum() == len(one.logprobs) == len(one.versions)
    assert asked[0].seed == 7 != asked[1].seed, "a turn's draws are its own"


def two_turns(one: Trajectory) -> int:
    """Tokens from the prompt's end to where the second turn begins."""
    return int(np.flatnonzero(np.diff(one.trained.astype(int)) == 1)[1]) + 1 - one.prompt_tokens


@pytest.mark.parametrize("said", ["Half", "Half STOP"])
def test_a_turn_that_was_not_ended_is_ended_by_tokens_that_are_not_trained(said: str, tokenizer: ChatTokenizer) -> None:
    finish = "stop" if "STOP" in said else "length"
    playing = playing_of(tokenizer, HERE + "Asker", options={"lines": ["Go on."]})
    one, _ = scripted_episode(tokenizer, playing, [(said, finish), ("Done<|im_end|>", "stop")])
    talk = [Message("user", "How many?"), Message("assistant", said), Message("user", "Go on.")]
    served = tokenizer.encode(tokenizer.render([*talk, Message("assistant", "Done")]).rstrip()).ids.tolist()
    assert one.token_ids.tolist() == served
    sampled = [tokenizer.decode([token], skip_special_tokens=False) for token in one.token_ids[one.trained]]
    assert "".join(sampled) == f"{said}Done<|im_end|>"
    assert one.answer.extra["environment"] == {"left": 0, "seed": 7}


def test_an_answer_that_was_cut_off_is_not_finished(tokenizer: ChatTokenizer) -> None:
    one, _ = scripted_episode(tokenizer, playing_of(tokenizer, "calculator"), [("It is", "length")])
    assert not one.finished and not one.answer.finished and one.failure is None


@pytest.mark.parametrize(("limit", "turns"), [({"max_turns": 2}, 2), ({"max_turns": 1}, 1)])
def test_turns_are_limited(limit: dict[str, int], turns: int, tokenizer: ChatTokenizer) -> None:
    playing = playing_of(tokenizer, "calculator", **limit)
    one, asked = scripted_episode(tokenizer, playing, [(f"{CALL}<|im_end|>", "stop")] * 3)
    assert len(asked) == turns and not one.finished and one.failure is None
    assert one.answer.text == CALL


def test_tokens_are_limited_in_all(tokenizer: ChatTokenizer) -> None:
    """Turns get what room is left, and nothing is asked where none is."""
    turns = [(f"{CALL}<|im_end|>", "stop")] * 9
    whole, _ = scripted_episode(tokenizer, playing_of(tokenizer, "calculator", max_turns=3), turns)
    begin = whole.prompt_tokens + two_turns(whole)
    for room, expected in ((0, 1), (1, 2), (5, 2)):
        playing = playing_of(tokenizer, "calculator", max_tokens=begin + room)
        one, asked = scripted_episode(tokenizer, playing, turns)
        assert len(asked) == expected and not one.finished
        assert asked[-1].sampling.max_new_tokens == min(99, begin + room - len(asked[-1].prompt_ids))


FAILURES = {
    "reset": "raised KeyError: 'no such level'",
    "exit": "raised SystemExit: enough",
    "late": "took more than 0.2 seconds",
    "nothing": "gave a NoneType, not a Turn",
    "silent": "goes on, and says nothing",
    "role": "not something Said by one of",
    "number": "not something Said by one of",
    "control": "said what cannot be shown",
    "no list": "gave a NoneType as messages, not a sequence",
    "once": "gave a generator as messages, not a sequence",
    "unhashable": "not something Said by one of",
    "surrogate": "said what is no text",
    "info": "gave a list as info, not a mapping",
}


@pytest.mark.parametrize("how", FAILURES)
def test_what_an_environment_does_costs_its_own_episode(how: str, tokenizer: ChatTokenizer) -> None:
    seconds = 0.2 if how == "late" else 60.0
    playing = playing_of(tokenizer, HERE + "Faulty", options={"how": how}, deadline_seconds=seconds)
    one, _ = scripted_episode(tokenizer, playing, [("Hm.<|im_end|>", "stop")])
    assert one.failure is not None and FAILURES[how] in one.failure and not one.finished
    assert len(one.logprobs) == one.trained.sum() == (0 if how == "reset" else one.answer.tokens)
    fine, _ = scripted_episode(tokenizer, playing_of(tokenizer, "calculator"), [("72<|im_end|>", "stop")])
    assert to_grade([fine, one, fine]) == [fine.answer, fine.answer]
    grades = with_failures([fine, one, fine], [Grade(1.0), Grade(0.5)])
    assert [grade.reward for grade in grades] == [1.0, None, 0.5] and grades[1].failure == one.failure


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("calculater", {}, "did you mean 'calculator'"),
        ("calculator", {"digits": 3}, "does not take these options"),
        (f"{__name__}:Nobody", {}, "cannot be imported"),
        (f"{__name__}:Roleless", {}, "who speaks in it"),
    ],
)
def test_environments_that_cannot_be(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        environment_maker(EnvironmentSpec(name, options))


lines = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=3)


@given(lines=lines, new_tokens=st.integers(1, 9), seed=st.integers(0, 2**64 - 1))
def test_what_was_sampled_and_what_was_said_is_the_trajectory(
    lines: list[str], new_tokens: int, seed: int, tokenizer: ChatTokenizer, talker: Path
) -> None:
    """Of the embedded engine: turns end by their limit or by the end-of-turn token, at a temperature that gives it."""
    playing = playing_of(tokenizer, HERE + "Asker", options={"lines": lines}, max_tokens=400)
    sampling = sampling_of(tokenizer, new_tokens, temperature=1.5)
    prompt = prompt_of(tokenizer, "How many?")
    engine = embedded(talker, window=400)
    asked: list[Request] = []
    sampled: list[list[int]] = []
    submit, step = engine.submit, engine.step

    def seen_submit(requests: Sequence[Request]) -> None:
        asked.extend(requests)
        submit(requests)

    def seen_step() -> Any:
        done = step()
        sampled.extend(one.token_ids.tolist() for one in done)
        return done

    engine.submit, engine.step = seen_submit, seen_step  # type: ignore[method-assign]
    (one,) = play_all(engine, playing.play, [(prompt, sampling, seed)])
    assert one.failure is None
    (end,) = sampling.stop_ids & {tokenizer.eos_id}
    tokens: list[int] = list(prompt.token_ids)
    for number, (request, turn) in enumerate(zip(asked, sampled, strict=True)):
        assert list(request.prompt_ids) == tokens, "tokens in: exactly what came out before, and what was said"
        tokens += turn
        if number < len(lines):
            said = f"<|im_start|>user\n{lines[number]}<|im_end|>\n<|im_start|>assistant\n"
            closed = "\n" if turn[-1] == end else "<|im_end|>\n"
            tokens += tokenizer.encode(closed).ids.tolist() + tokenizer.encode(said).ids.tolist()
    assert len(asked) == len(lines) + 1 and one.token_ids.tolist() == tokens
    assert one.token_ids[one.trained].tolist() == [token for turn in sampled for token in turn]
    assert not one.trained[: one.prompt_tokens].any()


def test_an_episode_of_one_turn_is_one_completion(tokenizer: ChatTokenizer, talker: Path) -> None:
    wanted = [(prompt_of(tokenizer, text), sampling_of(tokenizer, 12), seed) for seed, text in enumerate("abcdefgh")]
    plain = play_all(embedded(talker), Play(tokenizer.decode), wanted)
    playing = playing_of(tokenizer, HERE + "Asker", options={"lines": []})
    for one, other in zip(plain, play_all(embedded(talker), playing.play, wanted), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.trained.tolist() == other.trained.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist() and one.finished == other.finished
        assert one.answer.text == other.answer.text


def test_what_the_engine_raises_ends_the_play(tokenizer: ChatTokenizer, talker: Path) -> None:
    long = dataclasses.replace(prompt_of(tokenizer, "a"), token_ids=(5,) * 500)
    with pytest.raises(RolloutError, match="no room"):
        play_all(embedded(talker), Play(tokenizer.decode), [(long, sampling_of(tokenizer, 4), 0)])


def test_prompts_show_the_tools(tokenizer: ChatTokenizer) -> None:
    playing = playing_of(tokenizer, "calculator")
    bare = prompt_of(tokenizer, "How many?")
    (shown,) = playing.asked([bare])
    text = tokenizer.decode(list(shown.token_ids), skip_special_tokens=False)
    assert text == tokenizer.render([Message("user", "How many?")], playing.tools, answer_next=True)
    assert playing.asked([shown]) == [shown], "once"
    other = dataclasses.replace(bare, tools=({"type": "function", "function": {"name": "other"}},))
    with pytest.raises(DataError, match="not those of the environment"):
        playing.asked([other])
    assert Playing(tokenizer, Play(tokenizer.decode)).asked([bare]) == [bare]
