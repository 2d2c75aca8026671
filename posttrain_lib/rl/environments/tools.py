"""Prompts that show an environment's tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import render_prompt
from posttrain_lib.data.tokenize import tokenize
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Conversation, Message

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.rl.prompts import RolloutPrompt

_FIELDS = ("role", "content", "reasoning_content", "tool_calls")


def with_tools(
    prompts: Sequence[RolloutPrompt], tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]]
) -> list[RolloutPrompt]:
    """The prompts as serving would send them with these tools; those whose rows have them already are left alone.

    Raises:
        DataError: a row has tools, and not these; or the template does not print them.
    """
    return [_shown(prompt, tokenizer, tools) for prompt in prompts] if tools else list(prompts)


def _shown(prompt: RolloutPrompt, tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]]) -> RolloutPrompt:
    if prompt.tools:
        known, wanted = _names(prompt.tools), _names(tools)
        if not wanted <= known:
            raise DataError(
                "a prompt's row has tools, and not those of the environment",
                where=prompt.name,
                got=sorted(known),
                expected=sorted(wanted),
                fix="leave 'tools' out of the rows, and the environment's are shown; or give them these, too",
            )
        return prompt
    messages = tuple(_message(message) for message in prompt.messages)
    asked = Conversation(prompt.source, prompt.row_id, messages, tuple(dict(tool) for tool in tools))
    try:
        # Words that spell a control token were refused when the rows were prepared, unless as text is what they are.
        ids = tokenize(tokenizer, render_prompt(tokenizer, asked, "as_text").documents[0]).ids
    except RefusedRow as refusal:
        raise DataError(
            "the environment's tools cannot be shown in a prompt",
            where=prompt.name,
            got=refusal.detail,
            fix="name a template that prints tools (data.chat_template)",
        ) from refusal
    return dataclasses.replace(prompt, token_ids=tuple(ids.tolist()), tools=tuple(tools))


def _message(said: Mapping[str, Any]) -> Message:
    extra = {name: value for name, value in said.items() if name not in _FIELDS}
    calls = tuple(said.get("tool_calls", ()))
    return Message(said["role"], said.get("content"), said.get("reasoning_content"), calls, extra=extra)


def _names(tools: Sequence[Mapping[str, Any]]) -> set[str]:
    return {str(tool.get("function", tool)["name"]) for tool in tools}
