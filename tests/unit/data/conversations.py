"""Random conversations for the property tests: odd text, nested arguments, and words that spell control tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from posttrain_lib.schema.examples import Conversation, Message

#: control tokens of real tokenizers, halves of them, and what templates look for in the words
SPELT = (
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<|end|>", "<|user|>",
    "<|eot_id|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<end_of_turn>", "<｜User｜>", "<unk>",
)  # fmt: skip
HALVES = ("<|im_", "end|>", "<", "|>", ">", "[", "/INST]", "<|", "</", "s>", "<｜", "im_end", "user")
LOOKED_FOR = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "{{ x }}", "\n\n", "assistant\n")

CHARACTERS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12)
HARMLESS = st.one_of(
    CHARACTERS, st.sampled_from(["", " ", "  \n", "Four.", "naïve", "e\u0301", "日本", "👩‍👩‍👧", "\u200b"])
)


def words(*pieces: str) -> st.SearchStrategy[str]:
    """Texts of a few parts; some of them are among ``pieces``."""
    part = st.one_of(HARMLESS, st.sampled_from(pieces)) if pieces else HARMLESS
    return st.lists(part, max_size=4).map("".join)


def arguments(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Of a call: nested objects of every kind that JSON has."""
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False, width=16), text)
    nested = st.recursive(leaf, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2))
    return st.dictionaries(st.one_of(st.sampled_from(["a", "name"]), text), nested, max_size=3)


def tool(name: str, description: str) -> dict[str, Any]:
    properties = {"a": {"type": "integer", "description": description}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str]) -> Conversation:
    """One to three exchanges, some with a system turn, reasoning, tools and calls; answers say something."""
    answer = text.filter(str.strip)
    messages: list[Message] = []
    with_tools = draw(st.booleans()) and draw(st.booleans())
    if draw(st.booleans()):
        messages.append(Message("system", draw(text)))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(text)))
        if with_tools and draw(st.booleans()):
            call = {
                "type": "function",
                "id": "abcdefghi",
                "function": {"name": "f", "arguments": draw(arguments(text))},
            }
            messages.append(Message("assistant", draw(text), tool_calls=(call,)))
            messages.append(Message("tool", draw(text), extra={"tool_call_id": "abcdefghi", "name": "f"}))
        reasoning = draw(st.one_of(st.none(), answer))
        train = draw(st.sampled_from([None, None, True, False]))
        messages.append(Message("assistant", draw(answer), reasoning, train=train))
    tools = (tool("f", draw(text)),) if with_tools else ()
    return Conversation("random", "row", tuple(messages), tools)
