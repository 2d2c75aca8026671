"""Preference pairs in TRL's forms.

``prompt``, ``chosen``, ``rejected`` as lists of messages or as texts; or ``chosen`` and ``rejected`` as whole
conversations, whose common start is the prompt (``prompt`` may then be there too, as a text or as messages, and must be
that start's last question or the start itself). ``system`` is the prompt's first message.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import numpy as np

from posttrain_lib.data.formats.common import check_order, group_of, read, tools_of, turns_of, with_system
from posttrain_lib.data.formats.marked_calls import with_calls_read
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Message, PreferencePair

FIELDS = ("prompt", "chosen", "rejected", "system", "tools", "margin")
NEEDED = ("chosen", "rejected")
#: a token store holds margins in float32
_LARGEST_MARGIN = float(np.finfo(np.float32).max)

Messages = tuple[Message, ...]


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> PreferencePair:
    """Validate a row.

    Raises:
        RefusedRow: an answer is missing, both are the same, or they do not answer the same prompt.
    """
    found, names = read(row, FIELDS, fields)
    chosen, rejected = (turns_of(found[name], "assistant", names[name]) for name in ("chosen", "rejected"))
    prompt = None if not found["prompt"] else turns_of(found["prompt"], "user", names["prompt"])
    begun = prompt is None and len(chosen) > 1 and len(rejected) > 1  # whole, and the assistant greets
    if begun or chosen[0].role != "assistant" or rejected[0].role != "assistant":
        prompt, chosen, rejected = _apart(prompt, chosen, rejected)
    if prompt is None:
        raise RefusedRow("no_prompt", "the answers are no whole conversations, and the row has no prompt")
    tools = tools_of(found["tools"], names["tools"])
    prompt = with_system(found["system"], names["system"], prompt)
    everything = (*prompt, *chosen, *rejected)
    prompt, chosen, rejected = (with_calls_read(part, tools, everything) for part in (prompt, chosen, rejected))
    check_order(prompt, tools, answered=False)
    if chosen == rejected:
        raise RefusedRow("answers_equal", "the chosen answer is the rejected one")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(prompt, answer, name)
    group = group_of(row, prompt, group_field)
    return PreferencePair(source, row_id, prompt, chosen, rejected, tools, _margin(found["margin"]), group)


def _apart(prompt: Messages | None, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The common start of two conversations, up to its last question, and what each has behind it."""
    shared = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
    while shared and shared[-1].role not in ("user", "tool"):
        shared.pop()
    start = tuple(shared)
    if not start:
        raise RefusedRow("prompts_differ", "the chosen and the rejected conversation do not start with one prompt")
    if prompt is not None and start[-len(prompt) :] != prompt:
        raise RefusedRow("prompts_differ", "'prompt' is not what stands before the answers in the conversations")
    return start, chosen[len(start) :], rejected[len(start) :]


def _check_answer(prompt: Messages, answer: Messages, name: str) -> None:
    if not answer or answer[-1].role != "assistant":
        raise RefusedRow("no_assistant_turn", f"{name!r} ends without an answer")
    if any(message.train is not None or message.weight is not None for message in answer):
        raise RefusedRow("bad_weight", f"{name!r} has a message with a weight: the answers of a pair have weight 1")
    check_order((*prompt, *answer))


def _margin(raw: Any) -> float | None:
    if raw is None:
        return None
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) <= _LARGEST_MARGIN:
        raise RefusedRow("bad_margin", f"'margin' is {str(raw)[:40]!r}, expected a number that float32 holds")
    return float(raw)
