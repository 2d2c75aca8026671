"""Row format ``calculations``: worked solutions that mark what they calculate, as episodes with the calculator.

    prompt, solution "He has 48/2 = <<48/2=24>>24 left.\\n#### 24"
        ->  assistant "He has 48/2 =" and a call of the tool,  tool "24",  assistant "24 left.\\n#### 24"

The marks are GSM8K's (Cobbe et al. 2021, which had a calculator fill them in as the model wrote). A turn ends with each
mark; what the tool says is what the environment would say, so that a template renders a demonstration to the tokens of
a played episode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain_lib.data.formats.common import (
    check_order,
    group_of,
    only_text,
    read,
    tool_calls_of,
    tools_of,
    turns_of,
    with_system,
)
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.rl.environments.calculator import Calculator, evaluated, shown
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("prompt", "solution", "system")
NEEDED = ("prompt", "solution")

_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
#: a result may be rounded, to cents or to whole percents of itself
_ROUNDING = 0.01


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row. A solution without a mark is one turn that calls nothing.

    Raises:
        RefusedRow: no prompt or solution, or a mark that cannot be read, that the calculator cannot work out, or whose
            result is another than the calculator's.
    """
    found, names = read(row, FIELDS, fields)
    asked = with_system(found["system"], names["system"], turns_of(found["prompt"], "user", names["prompt"]))
    tools = tools_of(Calculator().tools())
    check_order(asked, tools, answered=False)
    messages = (*asked, *_episode(only_text(found["solution"], names["solution"]), tools[0]["function"]["name"]))
    return Conversation(source, row_id, messages, tools, group_of(row, messages, group_field))


def _episode(solution: str, tool: str) -> Iterator[Message]:
    """The turns of both sides."""
    *before, last = (text.strip() for text in _MARK.split(solution)[::3])
    for text in (*before, last):
        if "<<" in text or ">>" in text:
            raise RefusedRow("bad_calculation", f"a mark is not of the form <<expression=result>>: {text[:80]!r}")
    if not last:
        raise RefusedRow("no_assistant_turn", "the solution ends with a calculation, and says nothing behind it")
    for index, (text, (expression, result)) in enumerate(zip(before, _MARK.findall(solution), strict=True)):
        call = {"name": tool, "arguments": {"expression": expression}}
        yield Message("assistant", text, tool_calls=tool_calls_of([call], index))
        yield Message("tool", shown(_value(expression, result)))
    yield Message("assistant", last)


def _value(expression: str, result: str) -> int | float:
    try:
        value, said = evaluated(expression), float(result.replace(",", ""))
    except ValueError as error:
        raise RefusedRow("bad_calculation", f"<<{expression}={result}>>: {error}") from error
    if not abs(value - said) <= _ROUNDING * max(1.0, abs(value)):
        raise RefusedRow("wrong_calculation", f"<<{expression}={result}>>, and the calculator says {shown(value)}")
    return value
