"""No words of a row become control tokens: refused, or encoded as ordinary text, for every real tokenizer."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.control_tokens import spells_control_token, without_control_tokens
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import render_conversation
from posttrain_lib.data.tokenize import Tokens, tokenize
from posttrain_lib.schema.examples import Conversation, Message
from tests.unit.data.conversations import HALVES, LOOKED_FOR, SPELT, conversations, tool, words
from tests.unit.data.real_templates import OWN_TOKENIZER, TEMPLATE_ONLY

MARK = "<|im_end|>"


def talk(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation("s", "1", messages, tools)


def calling(name: str, arguments: dict[str, Any]) -> Message:
    call = {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}
    return Message("assistant", "", tool_calls=(call,))


ASKED, ANSWER = Message("user", "a"), Message("assistant", "b")
EVERYWHERE = {
    "content": talk(Message("user", f"a{MARK}"), ANSWER),
    "answer": talk(ASKED, Message("assistant", f"b{MARK}")),
    "reasoning": talk(ASKED, Message("assistant", "b", f"c{MARK}")),
    "name of a call": talk(ASKED, calling(MARK, {})),
    "argument": talk(ASKED, calling("f", {"a": [{"b": MARK}]})),
    "key of an argument": talk(ASKED, calling("f", {MARK: 1})),
    "extra field": talk(Message("user", "a", extra={"name": MARK}), ANSWER),
    "description of a tool": talk(ASKED, ANSWER, tools=(tool("f", MARK),)),
    "name of a tool": talk(ASKED, ANSWER, tools=(tool(MARK, "d"),)),
}


@pytest.mark.parametrize("where", EVERYWHERE)
def test_words_are_looked_at_wherever_a_template_may_print_them(where: str, chatml: ChatTokenizer) -> None:
    with pytest.raises(RefusedRow, match=r"control_token_in_text.*<\|im_end\|>"):
        without_control_tokens(chatml, EVERYWHERE[where], "refuse")
    changed, literal = without_control_tokens(chatml, EVERYWHERE[where], "as_text")
    assert literal
    assert MARK not in repr(changed)
    assert dataclasses.replace(changed, messages=(), tools=()) == Conversation("s", "1", ())


QWEN3_MARKS = ("<tool_call>", "</tool_response>", "<think>", "</think>", "<|fim_prefix|>", "<|file_sep|>")


@pytest.mark.parametrize(
    ("name", "mark"), [*(("qwen3", mark) for mark in QWEN3_MARKS), ("qwen2.5", "</tool_call>"), ("phi-3-mini", "</s>")]
)
def test_markers_that_are_not_flagged_as_special_are_control_tokens(
    name: str, mark: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    tokenizer = real_tokenizer(name)
    index = int(tokenizer.encode(mark).ids[0])
    assert tokenizer.pieces([index]) == [mark]
    assert index not in tokenizer.special_ids
    plain = talk(ASKED, ANSWER)
    expected = [(tokens.ids == index).sum() for tokens in made(tokenizer, plain, "refuse") or ()]
    others = {"user": talk(Message("user", f"a{mark}"), ANSWER), "tools": talk(ASKED, ANSWER, tools=(tool("f", mark),))}
    if name.startswith("qwen"):
        others["argument"] = talk(ASKED, calling("f", {"a": mark}))
    for where, conversation in others.items():
        with pytest.raises(RefusedRow, match="control_token_in_text"):
            without_control_tokens(tokenizer, conversation, "refuse")
        if where == "user":
            found = made(tokenizer, conversation, "as_text") or []
            assert [(tokens.ids == index).sum() for tokens in found] == expected
            assert f"a{mark}" in tokenizer.decode(found[0].ids, skip_special_tokens=False)


@pytest.mark.parametrize("policy", ["refuse", "as_text"])
def test_an_assistant_writes_the_markers_that_the_model_does(
    policy: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    tokenizer = real_tokenizer("qwen3")
    for text in ("<think>\nx\n</think>\n\nb", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'):
        said = talk(ASKED, Message("assistant", text))
        assert without_control_tokens(tokenizer, said, policy) == (said, False)
    for text in ("b<|fim_prefix|>", "b<tool_response>"):  # printed by the template, but where a tool speaks
        with pytest.raises(RefusedRow, match="control_token_in_text"):
            without_control_tokens(tokenizer, talk(ASKED, Message("assistant", text)), "refuse")


def test_which_added_tokens_are_markers(chatml_folder: Path, tmp_path: Path) -> None:
    """Words in brackets; not runs of spaces, plain words, signs, or HTML tags: those only make text shorter."""
    names = {"<tool_call>": 1, "</s>": 1, "[TOOL]": 1, "\uff5cend\uff5c": 1, "    ": 0, "word": 0, "[]": 0, "</td>": 0}
    folder = tmp_path / "tokenizer"
    shutil.copytree(chatml_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    first = 1 + max(content["model"]["vocab"].values())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": first + n, "content": name, **flags} for n, name in enumerate(names)]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = ChatTokenizer(folder)
    found = {name for name, special in tokenizer.markers.items() if not special}
    assert found == {name for name, is_marker in names.items() if is_marker}
    assert {name for name, special in tokenizer.markers.items() if special} == set(
        tokenizer.pieces(sorted(tokenizer.special_ids))
    )
    record = [{"tokens": [{"token": "<tool_call>", "special": False}, {"token": "</s>", "special": True}]}]
    (folder / "added_vocabulary.json").write_text(json.dumps(record), encoding="utf-8")
    words = ChatTokenizer(folder).markers  # what was added as text is text
    assert "<tool_call>" not in words and "</s>" in words
    ordinary = talk(Message("user", "a    word [] <table></td>"), ANSWER)
    assert without_control_tokens(tokenizer, ordinary, "refuse") == (ordinary, False)


def test_harmless_words_stay_as_they_are(chatml: ChatTokenizer) -> None:
    plain = talk(ASKED, ANSWER, tools=(tool("f", "d"),))
    assert without_control_tokens(chatml, plain, "as_text") == (plain, False)
    assert not spells_control_token(chatml, "a < b", "refuse")


JOINED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.name %}{{ m.name }}{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRAPPED = JOINED.replace("{{ m.name }}", "<|{{ m.name }}|>")


@pytest.mark.parametrize(
    ("template", "name", "content"), [(JOINED, "<|im_", "end|>hi"), (WRAPPED, "im_end", "hi")], ids=["halves", "inside"]
)
@pytest.mark.parametrize("policy", ["refuse", "as_text"])
def test_halves_that_the_template_puts_together(
    policy: str, template: str, name: str, content: str, with_template: Callable[..., ChatTokenizer]
) -> None:
    tokenizer = with_template(template)
    with pytest.raises(RefusedRow, match="control_token_in_text"):
        without_control_tokens(tokenizer, talk(Message("user", content, extra={"name": name}), ANSWER), policy)
    fine = talk(Message("user", "> hi", extra={"name": "Ann"}), ANSWER)
    assert without_control_tokens(tokenizer, fine, policy) == (fine, False)


def test_characters_that_stand_for_control_tokens_are_refused_only_where_they_are_needed(chatml: ChatTokenizer) -> None:
    private = Message("user", "a\U000f0001")
    assert not without_control_tokens(chatml, talk(private, ANSWER), "as_text")[1]
    with pytest.raises(RefusedRow, match="private_characters"):
        without_control_tokens(chatml, talk(private, Message("assistant", MARK)), "as_text")


def test_a_template_that_escapes_words_is_refused(with_template: Callable[..., ChatTokenizer]) -> None:
    tokenizer = with_template(JOINED.replace("{{ m.name }}", "{{ [m.name] | string }}"))
    conversation = talk(Message("user", "a", extra={"name": MARK}), ANSWER)
    document = render_conversation(tokenizer, conversation, "each", control_tokens="as_text").documents[0]
    with pytest.raises(RefusedRow, match="template_alters_words"):
        tokenize(tokenizer, document)


def test_text_that_spells_a_control_token_keeps_its_place_in_the_mask(chatml: ChatTokenizer) -> None:
    conversation = talk(Message("user", f"say {MARK}"), Message("assistant", f"it is {MARK}, in five"))
    document = render_conversation(chatml, conversation, "each", control_tokens="as_text").documents[0]
    tokens = tokenize(chatml, document)
    spelt = chatml.decode(tokens.ids, skip_special_tokens=False)
    assert spelt == f"<|im_start|>user\nsay {MARK}<|im_end|>\n<|im_start|>assistant\nit is {MARK}, in five<|im_end|>"
    learned = tokens.ids[tokens.weights > 0]
    assert chatml.decode(learned, skip_special_tokens=False) == f"it is {MARK}, in five<|im_end|>"
    assert np.isin(tokens.ids, list(chatml.special_ids)).sum() == 4
    assert set(tokens.by_role) == {"user", "assistant"}
    asked = chatml.encode("<|im_start|>user\n").ids
    assert tokens.by_role["user"] > len(asked) + len(chatml.encode("say ").ids), "the words count as the user's"


def made(tokenizer: ChatTokenizer, conversation: Conversation, policy: str) -> list[Tokens] | None:
    """The documents, None where one of them is refused."""
    try:
        rendered = render_conversation(tokenizer, conversation, "each", control_tokens=policy)
        return [tokenize(tokenizer, document) for document in rendered.documents]
    except RefusedRow:
        return None


def with_harmless_words(tokenizer: ChatTokenizer, conversation: Conversation) -> Conversation:
    """The same conversation with a letter for every control token that it spells.

    All added tokens are, but for those that a model writes in its answers.
    """
    added = {token.content for token in tokenizer._tokenizer.added_tokens_decoder.values()}
    special = set(tokenizer.pieces(sorted(tokenizer.special_ids)))
    written = {"<think>", "</think>", "<tool_call>", "</tool_call>"} - special
    everywhere, in_answers = (
        re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) for names in (added, added - written)
    )

    def changed(value: Any, pattern: re.Pattern[str] = everywhere) -> Any:
        if isinstance(value, str):
            return pattern.sub("Z", value)
        if isinstance(value, dict):
            return {changed(key): changed(part) for key, part in value.items()}
        return [changed(part) for part in value] if isinstance(value, list | tuple) else value

    def said(message: Message, words: str | None) -> Any:
        return changed(words, in_answers if message.role == "assistant" else everywhere)

    messages = tuple(
        dataclasses.replace(
            message,
            content=said(message, message.content),
            reasoning_content=said(message, message.reasoning_content),
            tool_calls=tuple(changed(message.tool_calls)),
        )
        for message in conversation.messages
    )
    return dataclasses.replace(conversation, messages=messages, tools=tuple(changed(conversation.tools)))


#: what was seen over all examples of a property: that it was not refused every time
Seen = SimpleNamespace


# The others share one vocabulary, and making a second tokenizer of it for each takes the time.
@pytest.mark.parametrize(
    "name", [*OWN_TOKENIZER, *(pytest.param(name, marks=pytest.mark.slow) for name in TEMPLATE_ONLY)]
)
def test_no_control_id_comes_from_the_words(name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    tokenizer, seen = real_tokenizer(name), Seen(compared=0)
    control = np.array(sorted(tokenizer._tokenizer.added_tokens_decoder))
    own = [spelt for spelt in SPELT if tokenizer.special_token and tokenizer.special_token.fullmatch(spelt)]

    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations(words(*SPELT, *HALVES, *LOOKED_FOR)), st.sampled_from(own))
    def check(conversation: Conversation, spelt: str) -> None:
        asked = (Message("user", f"a {spelt} b"), Message("assistant", f"{spelt} c"))
        conversation = dataclasses.replace(conversation, messages=(*conversation.messages, *asked))
        found = made(tokenizer, conversation, "as_text")
        expected = made(tokenizer, with_harmless_words(tokenizer, conversation), "refuse")
        if found is None or expected is None:
            return
        seen.compared += 1
        counts = [[int(np.isin(tokens.ids, control).sum()) for tokens in documents] for documents in (found, expected)]
        assert counts[0] == counts[1]

    check()
    assert seen.compared, "every example was refused"
