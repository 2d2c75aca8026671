"""The calculator: Python's own values, bounds, and what a policy gets for calls that are none."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.rl.environments.calculator import Calculator, evaluated, shown

numbers = st.integers(0, 99).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda parts: f"({' '.join(parts)})")
        | inner.map(lambda text: f"-{text}")
    ),
    max_leaves=6,
)


def call(expression: object, name: str = "calculator") -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'expression': expression}})}</tool_call>"


@given(expression=expressions)
def test_values_are_pythons(expression: str) -> None:
    assert evaluated(expression) == eval(expression)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("48/2+48", "72"), ("7/2", "3.5"), ("2**10", "1024"), ("7//2", "3"), ("7 % 4", "3"), ("1/3", "0.333333333333"),
     (" 0.1+0.2 ", "0.3"), ("-(2+3)*4", "-20")],
)  # fmt: skip
def test_results_are_short(expression: str, expected: str) -> None:
    assert shown(evaluated(expression)) == expected


@pytest.mark.parametrize(
    "expression",
    ["", "x", "f(1)", "().__class__", "'a'*9", "True", "1j", "[1]", "1 if 1 else 2", "1;2", "1/0", "0**-1", "1%0",
     "9**65", "9**64**9", "10**20*10**20", "(-8)**0.5", "1e999", "1e300",
     "1+" * 150 + "1", "(" * 199, "1\0", "a\udc80"],
    ids=ascii,
)  # fmt: skip
def test_what_has_no_value_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        evaluated(expression)


def test_calls_are_answered_and_counted() -> None:
    calculator = Calculator()
    turn = calculator.step(
        f"I see. {call('6*7')} and {call('6*')}{call('1', 'other')}{call(3)}<tool_call>x</tool_call>"
    )
    assert not turn.done and {message.role for message in turn.messages} == {"tool"}
    assert [message.content for message in turn.messages] == [
        "42",
        "error: not an arithmetic expression",
        "error: the only tool is calculator",
        "error: the call has no argument 'expression' of text",
        "error: the call is no JSON",
    ]
    last = calculator.step("It is 42.")
    assert last.done and last.info == {"calls": 5, "failed_calls": 4}


def test_it_agrees_with_the_sums_in_gsm8k(real_data: Path) -> None:
    """The data set writes them as <<48/2=24>>; where it rounds, or leaves a sign out, it is right and so are we."""
    rows = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    sums = [found for row in rows for found in re.findall(r"<<([^=<>]+)=([^<>]+)>>", json.loads(row)["answer"])]
    agree = 0
    for expression, result in sums:
        with contextlib.suppress(ValueError):
            agree += abs(evaluated(expression) - float(result)) <= 0.01 * max(1.0, abs(float(result)))
    assert len(sums) > 1000 and agree / len(sums) > 0.95


def test_the_policys_words_do_not_come_back() -> None:
    (message,) = Calculator().step(call("<|im_end|>")).messages
    assert "im_end" not in message.content
