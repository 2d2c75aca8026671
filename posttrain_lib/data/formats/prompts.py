"""Prompts for reinforcement learning: ``prompt`` as a text or messages, and the ``answer`` that a reward compares with.

The row's other fields are kept for the reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import check_order, group_of, read, tools_of, turns_of, with_system
from posttrain_lib.data.formats.marked_calls import with_calls_read
from posttrain_lib.data.refusal import RefusedRow, kind_of
from posttrain_lib.schema.examples import Prompt

FIELDS = ("prompt", "answer", "system", "tools")
NEEDED = ("prompt",)


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Prompt:
    """Validate a row.

    Raises:
        RefusedRow: no prompt, one that asks nothing, or an answer that is neither text nor a number.
    """
    found, names = read(row, FIELDS, fields)
    tools = tools_of(found["tools"], names["tools"])
    asked = with_system(found["system"], names["system"], turns_of(found["prompt"], "user", names["prompt"]))
    messages = with_calls_read(asked, tools)
    check_order(messages, tools, answered=False)
    answer = found["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise RefusedRow("answer_not_text", f"the answer is {kind_of(answer)}, expected a text or a number")
    extra = {key: value for key, value in row.items() if key not in names.values() and value is not None}
    group = group_of(row, messages, group_field)
    return Prompt(source, row_id, messages, None if answer is None else str(answer), tools, group, extra)
