"""Worked solutions as demonstrations: what they say, what is refused, and that they are episodes to the token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import render_conversation
from posttrain_lib.data.tokenize import Tokens, tokenize
from posttrain_lib.rl.environments.base import EnvironmentSpec
from posttrain_lib.rl.environments.calculations import parse
from posttrain_lib.rl.playing import make_playing
from posttrain_lib.rl.trajectories import Trajectory
from posttrain_lib.schema.examples import Conversation
from posttrain_lib.schema.rollouts import Completion, Request
from tests.support.dialogues import prompt_of, sampling_of

CLIPS = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 in all.\n#### 72"
SOLUTIONS = [
    CLIPS,
    "<<5000*2=10,000>>10,000 and then <<10000/3=3333.33>> <<1-2=-1>>-1\n#### -1",
    "Nothing to work out.\n#### 7",
    'It says "a": 3*4={<<3*4=12>>12}.\n#### 12',
]


def parsed(solution: object, prompt: str = "How many?") -> Conversation:
    return parse({"prompt": prompt, "solution": solution}, "s", "0", None, {})


def demonstrated(tokenizer: ChatTokenizer, solution: str, prompt: str) -> Tokens:
    """As training has it."""
    (document,) = render_conversation(tokenizer, parsed(solution, prompt), "each").documents
    return tokenize(tokenizer, document)


def played(tokenizer: ChatTokenizer, demonstration: Tokens, prompt: str) -> Trajectory:
    """An episode in which the policy samples what the demonstration trains, turn by turn; all else is the run's."""
    sampling = sampling_of(tokenizer, 400)
    spec = EnvironmentSpec("calculator", max_turns=20, max_tokens=4000)
    playing = make_playing(tokenizer, spec, None, sampling.stop_ids, "the template")
    turns = [demonstration.ids[first:last] for first, last in demonstration.answers]

    async def complete(request: Request) -> Completion:
        ids = turns.pop(0)
        return Completion(request.key, ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "stop")

    (asked,) = playing.asked([prompt_of(tokenizer, prompt)])
    one = asyncio.run(playing.play(asked, sampling, 0, "a", complete))  # type: ignore[arg-type]
    assert one.failure is None and one.finished and not turns
    return one


def assert_an_episode(tokenizer: ChatTokenizer, solution: str, prompt: str = "How many clips?") -> Trajectory:
    demonstration = demonstrated(tokenizer, solution, prompt)
    one = played(tokenizer, demonstration, prompt)
    assert one.token_ids.tolist() == demonstration.ids.tolist()
    assert one.trained.tolist() == (demonstration.weights > 0).tolist()
    calls = solution.count("<<")
    assert one.answer.extra["environment"] == {"calls": calls, "failed_calls": 0}
    return one


def test_marks_become_calls_and_answers() -> None:
    found = parsed(CLIPS)
    said = [(message.role, message.content) for message in found.messages]
    assert said == [
        ("user", "How many?"),
        ("assistant", "Natalia sold 48/2 ="),
        ("tool", "24"),
        ("assistant", "24 clips in May.\nShe sold 48+24 ="),
        ("tool", "72"),
        ("assistant", "72 in all.\n#### 72"),
    ]
    calls = [call["function"] for message in found.messages for call in message.tool_calls]
    assert [call["arguments"]["expression"] for call in calls] == ["48/2", "48+24"]
    assert {call["name"] for call in calls} == {found.tools[0]["function"]["name"]} == {"calculator"}


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_a_demonstration_is_a_played_episode(solution: str, tokenizer: ChatTokenizer) -> None:
    one = assert_an_episode(tokenizer, solution)
    assert one.answer.text == solution.rpartition(">>")[2].strip()


@pytest.mark.parametrize(
    ("solution", "reason", "said"),
    [
        ("So <<48/2>>24", "bad_calculation", "not of the form"),
        ("So <<48/2=24", "bad_calculation", "not of the form"),
        ("So <<48/0=24>>24", "bad_calculation", "division by zero"),
        ("So <<half of 48=24>>24", "bad_calculation", "not an arithmetic expression"),
        ("So <<48/2=a few>>24", "bad_calculation", "a few"),
        ("So <<48/2=25>>25", "wrong_calculation", "the calculator says 24"),
        ("So <<48/2=nan>>24", "wrong_calculation", "the calculator says 24"),
        ("So <<48/2=24>>", "no_assistant_turn", "says nothing behind it"),
        ("  ", "empty_text", "solution"),
        (24, "content_not_text", "solution"),
    ],
)
def test_what_cannot_be_demonstrated_is_refused(solution: object, reason: str, said: str) -> None:
    with pytest.raises(RefusedRow, match=said) as refused:
        parsed(solution)
    assert refused.value.reason == reason


def test_real_solutions_are_episodes_under_a_real_template(real_data: Path) -> None:
    tokenizer = ChatTokenizer(real_data / "tokenizers" / "qwen2.5")
    with open(real_data / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::500]
    for row in rows:
        assert_an_episode(tokenizer, row["answer"], row["question"])
    assert len(rows) > 10
