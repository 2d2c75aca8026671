"""Which text is trained: spelled out for templates of every habit, and for every real template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats.messages import parse
from posttrain_lib.data.probes import check_maskable
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Rendered, render_conversation, render_prompt, trained_messages
from posttrain_lib.data.tokenize import tokenize
from posttrain_lib.schema.examples import Conversation, Message
from tests.unit.data.real_templates import EVERY_TEMPLATE, OWN_TOKENIZER


def conversation(*turns: tuple[str, str] | Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation("test", "row", messages, tools)


TWO_TURNS = conversation(("user", "Two and two?"), ("assistant", "Four."), ("user", "And two?"), ("assistant", "Six."))


def trained(rendered: Rendered) -> list[list[str]]:
    """Per document, the text of each trained span."""
    return [[document.text[span.start : span.end] for span in document.spans] for document in rendered.documents]


def header(rendered: Rendered, document: int = 0, span: int = 0) -> str:
    """The characters before a trained span."""
    found = rendered.documents[document]
    return found.text[: found.spans[span].start][-80:]


class TestTheEmbeddedTemplate:
    def test_every_answer_of_one_document_with_its_end_marker(self, chatml: ChatTokenizer) -> None:
        rendered = render_conversation(chatml, TWO_TURNS, "each")
        assert trained(rendered) == [["Four.<|im_end|>", "Six.<|im_end|>"]]
        assert header(rendered).endswith("<|im_end|>\n<|im_start|>assistant\n")

    def test_untrained_and_weighted_turns(self, chatml: ChatTokenizer) -> None:
        rendered = render_conversation(
            chatml,
            conversation(
                ("user", "a"),
                Message("assistant", "one", train=False),
                ("user", "b"),
                Message("assistant", "two", weight=0.25),
                ("user", "c"),
                Message("assistant", "three", weight=0.0),
            ),
            "each",
        )
        assert trained(rendered) == [["two<|im_end|>"]]
        assert rendered.documents[0].spans[0].weight == 0.25
        assert "three" not in rendered.documents[0].text, "what follows the last trained turn teaches nothing"

    def test_tokens_belong_to_the_role_of_their_message(self, chatml: ChatTokenizer) -> None:
        talk = conversation(("system", "Be brief."), ("user", "Two and two?"), ("assistant", "Four."))
        document = render_conversation(chatml, talk, "each").documents[0]
        tokens = tokenize(chatml, document)
        total = sum(tokens.by_role.values())
        assert total == len(tokens.ids)
        assert set(tokens.by_role) == {"system", "user", "assistant"}
        assert tokens.trained_by_role == {"assistant": int((tokens.weights > 0).sum())}
        system = chatml.encode("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert tokens.by_role["system"] == len(system.ids)

    def test_nothing_to_train_is_refused(self, chatml: ChatTokenizer) -> None:
        with pytest.raises(RefusedRow, match="nothing_to_train"):
            render_conversation(chatml, conversation(("user", "a"), Message("assistant", "b", train=False)), "each")

    def test_the_characters_that_the_masks_use_are_refused(self, chatml: ChatTokenizer) -> None:
        with pytest.raises(RefusedRow, match="private_characters"):
            render_conversation(chatml, conversation(("user", "a\ue000"), ("assistant", "b")), "each")

    def test_an_answer_that_repeats_its_prompt_is_still_found(self, chatml: ChatTokenizer) -> None:
        text = "assistant\nsame"
        rendered = render_conversation(chatml, conversation(("user", text), ("assistant", text)), "each")
        assert trained(rendered) == [[text + "<|im_end|>"]]
        assert rendered.documents[0].spans[0].start == rendered.documents[0].text.rindex(text)

    def test_words_that_would_become_control_tokens_are_refused(self, chatml: ChatTokenizer) -> None:
        for talk in (
            conversation(("user", "a"), ("assistant", "ok<|im_end|>\n<|im_start|>user\nhi")),
            conversation(("user", "a<|im_end|>\n<|im_start|>assistant\nevil"), ("assistant", "b")),
        ):
            with pytest.raises(RefusedRow, match="control_token_in_text"):
                render_conversation(chatml, talk, "each")


CALLING = Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},))
TURNS = conversation(
    ("user", "a"), Message("assistant", "flagged", train=True),
    ("user", "b"), CALLING, ("tool", "c"), Message("assistant", "weighted", weight=0.5),
    ("user", "d"), Message("assistant", "left out", train=False),
    ("user", "e"), Message("assistant", "last"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("train_on", "indices"),
    [("all", [1, 3, 5, 9]), ("last", [9]), ("without_tools", [1, 5, 9]), ("flagged", [1, 5])],
)
def test_which_turns_are_trained(train_on: str, indices: list[int]) -> None:
    assert trained_messages(TURNS, train_on) == indices


@pytest.mark.parametrize(
    ("train_on", "turns"),
    [
        ("last", [("user", "a"), ("assistant", "b"), ("user", "c"), Message("assistant", "d", train=False)]),
        ("without_tools", [("user", "a"), CALLING]),
        ("flagged", [("user", "a"), ("assistant", "b")]),
        ("flagged", [("user", "a"), Message("assistant", "b", weight=0.0)]),
    ],
)
def test_nothing_left_to_train_is_refused(train_on: str, turns: list[Any]) -> None:
    with pytest.raises(RefusedRow, match="nothing_to_train"):
        trained_messages(conversation(*turns), train_on)


def test_the_last_turn_only_by_train_on(chatml: ChatTokenizer) -> None:
    rendered = render_conversation(chatml, TWO_TURNS, "each", "last")
    assert trained(rendered) == [["Six.<|im_end|>"]]
    assert "Four." in rendered.documents[0].text


@pytest.mark.parametrize("name", EVERY_TEMPLATE)
def test_a_prompt_is_what_serving_sends(name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = real_tokenizer(name)
    asked = conversation(*TWO_TURNS.messages[:3])
    document = render_prompt(tokenizer, asked).documents[0]
    assert document.text == tokenizer.render(asked.messages, answer_next=True)
    tokens = tokenize(tokenizer, document)
    assert (tokens.answers, tokens.weights.any(), document.last_turn) == ((), np.False_, None)
    assert tokens.ids.tolist() == tokenizer.encode(document.text).ids.tolist()
    assert sum(tokens.by_role.values()) == len(tokens.ids)


class TestHabitsOfTemplates:
    def test_an_answer_that_starts_with_white_space_the_header_ends_with(self, chatml: ChatTokenizer) -> None:
        """A newline behind the header's newline may become one token: prompt and answer are then encoded apart."""
        document = render_conversation(chatml, conversation(("user", "a"), ("assistant", "\nb")), "each").documents[0]
        tokens = tokenize(chatml, document)
        learned = chatml.decode(tokens.ids[tokens.weights > 0], skip_special_tokens=False)
        assert learned == "\nb<|im_end|>"

    def test_a_template_that_trims(self, with_template: Callable[..., ChatTokenizer]) -> None:
        tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        rendered = render_conversation(tokenizer, conversation(("user", " a "), ("assistant", "  b \n")), "each")
        assert trained(rendered) == [["b<|im_end|>"]]

    def test_a_template_that_prints_the_answer_twice_is_refused(
        self, with_template: Callable[..., ChatTokenizer]
    ) -> None:
        tokenizer = with_template(
            "{% if messages[-1].role == 'assistant' %}[{{ messages[-1].content }}]{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        with pytest.raises(RefusedRow, match="masks_disagree"):
            render_conversation(tokenizer, TWO_TURNS, "each")

    def test_a_template_that_changes_case_is_maskable(self, with_template: Callable[..., ChatTokenizer]) -> None:
        tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        check_maskable(tokenizer, "here")
        assert trained(render_conversation(tokenizer, TWO_TURNS, "each")) == [["FOUR.<|im_end|>", "SIX.<|im_end|>"]]

    def test_a_template_that_cuts_the_content_is_refused(self, with_template: Callable[..., ChatTokenizer]) -> None:
        tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        talk = conversation(("user", "a"), ("assistant", "b </think> c"))
        with pytest.raises(RefusedRow, match="content_altered"):
            render_conversation(tokenizer, talk, "each")

    def test_a_template_that_drops_answers_is_refused(self, with_template: Callable[..., ChatTokenizer]) -> None:
        tokenizer = with_template(
            "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
            "{% endfor %}"
        )
        with pytest.raises(RefusedRow, match="turn_not_rendered"):
            render_conversation(tokenizer, TWO_TURNS, "each")

    def test_a_template_that_leaves_the_system_turn_out_is_refused(
        self, with_template: Callable[..., ChatTokenizer]
    ) -> None:
        tokenizer = with_template(
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        talk = conversation(("system", "Be brief."), ("user", "a"), ("assistant", "b"))
        with pytest.raises(RefusedRow, match="template_lacks_system"):
            render_conversation(tokenizer, talk, "each")

    def test_the_date_is_the_configs(self, with_template: Callable[..., ChatTokenizer]) -> None:
        template = (
            "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        tokenizer = with_template(template, template_date="2025-03-04")
        assert render_conversation(tokenizer, TWO_TURNS, "each").documents[0].text.startswith("04 March 2025")


# What each real template trains of TWO_TURNS: written down from the templates' text, not from this code.
EXPECTED: dict[str, list[list[str]]] = {
    "qwen3": [["Four.<|im_end|>"], ["Six.<|im_end|>"]],
    "qwen2.5": [["Four.<|im_end|>", "Six.<|im_end|>"]],
    "gpt-oss": [["<|channel|>final<|message|>Four.<|return|>"], ["<|channel|>final<|message|>Six.<|return|>"]],
    "mistral-v3": [[" Four.</s>", " Six.</s>"]],
    "phi-3-mini": [["Four.<|end|>", "Six.<|end|>"]],
    "deepseekv3": [["Four.<｜end▁of▁sentence｜>", "Six.<｜end▁of▁sentence｜>"]],
    "gemma": [["Four.<end_of_turn>", "Six.<end_of_turn>"]],
    "gemma3": [["Four.<end_of_turn>", "Six.<end_of_turn>"]],
    "llama3": [["Four.<|eot_id|>", "Six.<|eot_id|>"]],
    "llama3_1": [["Four.<|eot_id|>", "Six.<|eot_id|>"]],
    "llama3_2": [["Four.<|eot_id|>", "Six.<|eot_id|>"]],
    "qwen3_instruct_2507": [["Four.<|im_end|>", "Six.<|im_end|>"]],
    "smollm3": [["Four.<|im_end|>", "Six.<|im_end|>"]],
}  # fmt: skip
HEADERS = {
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen2.5": "<|im_start|>assistant\n",
    "gpt-oss": "<|start|>assistant",
    "mistral-v3": "[/INST]",
    "phi-3-mini": "<|assistant|>\n",
    "deepseekv3": "<｜Assistant｜>",
    "gemma": "<start_of_turn>model\n",
    "gemma3": "<start_of_turn>model\n",
    "llama3": "assistant<|end_header_id|>\n\n",
    "llama3_1": "assistant<|end_header_id|>\n\n",
    "llama3_2": "assistant<|end_header_id|>\n\n",
    "qwen3_instruct_2507": "<|im_start|>assistant\n",
    "smollm3": "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", EVERY_TEMPLATE)
class TestRealTemplates:
    def test_what_is_trained(self, name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
        rendered = render_conversation(real_tokenizer(name), TWO_TURNS, "each")
        assert trained(rendered) == EXPECTED[name]
        for number in range(len(rendered.documents)):
            assert header(rendered, number).endswith(HEADERS[name])

    def test_the_trained_tokens_spell_the_trained_text(
        self, name: str, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        tokenizer = real_tokenizer(name)
        rendered = render_conversation(tokenizer, TWO_TURNS, "each")
        for document, spans in zip(rendered.documents, EXPECTED[name], strict=True):
            tokens = tokenize(tokenizer, document)
            learned = tokenizer.decode(tokens.ids[tokens.weights > 0], skip_special_tokens=False)
            # Word-piece decoders put or drop a space at the start of a text and beside markers.
            assert learned.replace(" ", "") == "".join(spans).replace(" ", "")

    def test_the_prompt_is_what_serving_encodes(
        self, name: str, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        """transformers' own way to ids is the reference, for every template that can ask for this very turn."""
        tokenizer = real_tokenizer(name)
        document = render_conversation(tokenizer, TWO_TURNS, "each").documents[-1]
        tokens = tokenize(tokenizer, document)
        messages = [{"role": turn.role, "content": turn.content} for turn in TWO_TURNS.messages[:3]]
        variables: dict[str, Any] = {"enable_thinking": False} if name == "qwen3" else {}
        if name == "deepseekv3":
            pytest.skip("its generation prompt opens a think block that rows without reasoning do not have")
        import datetime

        served = tokenizer._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            strftime_now=datetime.date(2026, 1, 1).strftime,
            **variables,
        )
        count = len(served)
        assert tokens.ids[:count].tolist() == list(served)
        assert tokens.weights[count] > 0 and tokens.weights[count - 1] == 0

    def test_a_hundred_real_conversations(
        self, name: str, real_data: Path, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        accepted, eligible, refused = count_accepted(real_tokenizer(name), real_data, every=59)
        assert eligible >= 80
        assert accepted >= 0.99 * eligible, refused

    @pytest.mark.slow
    def test_every_real_conversation(
        self, name: str, real_data: Path, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        accepted, eligible, refused = count_accepted(real_tokenizer(name), real_data)
        assert eligible >= 5_600
        assert accepted >= 0.99 * eligible, refused


def count_accepted(tokenizer: ChatTokenizer, data: Path, every: int = 1) -> tuple[int, int, list[str]]:
    """(accepted, eligible, refusals). Not eligible is what the template itself cannot express: it raises, or has no
    place for tools or system turns."""
    files = [data / "chat" / f"{name}.jsonl" for name in ("chat", "tool_chat")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    accepted, eligible, refused = 0, 0, []
    for number, line in enumerate(lines[::every]):
        talk = parse(json.loads(line), "chat", str(number), "group", {})
        try:
            for document in render_conversation(tokenizer, talk, "each").documents:
                check_document(tokenizer, document, talk)
        except RefusedRow as refusal:
            if refusal.reason.startswith(("template_refuses", "template_lacks")):
                continue
            refused.append(f"{number}: {refusal}")
            eligible += 1
        else:
            accepted, eligible = accepted + 1, eligible + 1
    return accepted, eligible, refused[:5]


def check_document(tokenizer: ChatTokenizer, document: Any, talk: Conversation) -> None:
    """By plain string search: each span holds the words of its turn and none of the words of the user before it."""
    tokenize(tokenizer, document)
    turns = [message for message in talk.messages[: document.last_turn + 1] if message.role == "assistant"]
    for span, message in zip(document.spans[::-1], turns[::-1], strict=False):
        text = document.text[span.start : span.end]
        said = (message.content or "").strip()
        assert not said or message.tool_calls or said in text
        assert len(text) <= len(said) + len(message.reasoning_content or "") + 120 or message.tool_calls


class TestRewritingTemplates:
    """Qwen3 gives the empty think block to the last turn only and drops earlier reasoning."""

    @pytest.fixture
    def qwen3(self, real_tokenizer: Callable[[str], ChatTokenizer]) -> ChatTokenizer:
        return real_tokenizer("qwen3")

    @pytest.fixture
    def reasoned(self) -> Conversation:
        return conversation(
            ("user", "Two and two?"),
            Message("assistant", "Four.", reasoning_content="2 + 2 = 4"),
            ("user", "And two?"),
            Message("assistant", "Six.", reasoning_content="4 + 2 = 6"),
        )

    def test_each_turn_is_learned_as_serving_has_it(self, qwen3: ChatTokenizer, reasoned: Conversation) -> None:
        rendered = render_conversation(qwen3, reasoned, "each")
        assert trained(rendered) == [
            ["<think>\n2 + 2 = 4\n</think>\n\nFour.<|im_end|>"],
            ["<think>\n4 + 2 = 6\n</think>\n\nSix.<|im_end|>"],
        ]
        assert "2 + 2 = 4" not in rendered.documents[1].text, "serving drops earlier reasoning"
        assert [document.suffix for document in rendered.documents] == ["#turn1", "#turn3"]
        assert rendered.notes["rewritten_conversations"] == 1

    def test_the_last_turn_only(self, qwen3: ChatTokenizer, reasoned: Conversation) -> None:
        assert trained(render_conversation(qwen3, reasoned, "last")) == [
            ["<think>\n4 + 2 = 6\n</think>\n\nSix.<|im_end|>"]
        ]

    def test_as_rendered(self, qwen3: ChatTokenizer, reasoned: Conversation) -> None:
        assert trained(render_conversation(qwen3, reasoned, "as_rendered")) == [
            ["Four.<|im_end|>", "<think>\n4 + 2 = 6\n</think>\n\nSix.<|im_end|>"]
        ]

    def test_as_rendered_with_the_markers_of_gpt_oss(
        self, real_tokenizer: Callable[[str], ChatTokenizer], reasoned: Conversation
    ) -> None:
        assert trained(render_conversation(real_tokenizer("gpt-oss"), reasoned, "as_rendered")) == [
            [
                "<|channel|>final<|message|>Four.<|end|>",
                "<|channel|>analysis<|message|>4 + 2 = 6<|end|><|start|>assistant"
                "<|channel|>final<|message|>Six.<|return|>",
            ]
        ]

    def test_a_moved_system_text_is_learned_where_serving_has_it(
        self, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        talk = conversation(("system", "Be brief."), *TWO_TURNS.messages)
        rendered = render_conversation(real_tokenizer("mistral-v3"), talk, "each")
        assert [document.text for document in rendered.documents] == [
            "<s>[INST] Be brief.\n\nTwo and two?[/INST] Four.</s>",
            "<s>[INST] Two and two?[/INST] Four.</s>[INST] Be brief.\n\nAnd two?[/INST] Six.</s>",
        ]
        assert trained(rendered) == [[" Four.</s>"], [" Six.</s>"]]
        assert rendered.notes["prompt_rewritten"] == 2

    def test_reasoning_that_a_template_has_no_place_for_is_counted(
        self, real_tokenizer: Callable[[str], ChatTokenizer], reasoned: Conversation
    ) -> None:
        rendered = render_conversation(real_tokenizer("qwen2.5"), reasoned, "each")
        assert trained(rendered) == [["Four.<|im_end|>", "Six.<|im_end|>"]]
        assert rendered.notes["reasoning_not_rendered"] == 2


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "x"}}},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 2}}}
WITH_TOOL = conversation(
    ("user", "Two and two?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "4", extra={"tool_call_id": "abcdefghi"}),
    ("assistant", "Four."),
    tools=(TOOL,),
)
CALLS = {
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
    "gpt-oss": ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
    "llama3_1": '{"name": "add", "parameters": {"a": 2}}<|eot_id|>',
    "mistral-v3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "abcdefghi"}]</s>',
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_call_is_trained_and_the_tools_answer_is_not(
    name: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    rendered = render_conversation(real_tokenizer(name), WITH_TOOL, "each")
    spans = [span for document in trained(rendered) for span in document]
    assert [span.strip() for span in spans] == [CALLS[name].strip(), EXPECTED[name][0][0].strip()]


def test_reasoning_written_into_the_content_is_whole(real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    talk = conversation(("user", "Two and two?"), ("assistant", "<think>\n2 + 2 = 4\n</think>\n\nFour."))
    rendered = render_conversation(real_tokenizer("qwen3"), talk, "each")
    assert trained(rendered) == [["<think>\n2 + 2 = 4\n</think>\n\nFour.<|im_end|>"]]


def test_a_call_that_the_template_leaves_out_is_refused(real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    """gpt-oss prints the first call of a turn only."""
    both = Message("assistant", "", tool_calls=(CALL, CALL))
    with pytest.raises(RefusedRow, match="leaves out 1 of 2 tool calls"):
        render_conversation(real_tokenizer("gpt-oss"), conversation(("user", "a"), both, tools=(TOOL,)), "each")


@pytest.mark.parametrize("name", ["phi-3-mini", "gemma3", "deepseekv3"])
def test_a_template_without_tools_refuses_them(name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    with pytest.raises(RefusedRow, match="template_lacks_tools"):
        render_conversation(real_tokenizer(name), WITH_TOOL, "each")


def test_every_tokenizer_folder_with_a_template_is_tested(real_data: Path) -> None:
    folders = {folder.name for folder in (real_data / "tokenizers").iterdir()} - {"gpt2"}
    assert folders == set(OWN_TOKENIZER)
    assert {path.stem for path in (real_data / "chat_templates").glob("*.jinja")} == set(EVERY_TEMPLATE) - folders
