"""What stands between turns is what serving would send; templates that rewrite history are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.probes import stop_ids
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.embedded.tokenizer import CHAT_TEMPLATE
from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.environments.base import Said
from posttrain_lib.rl.environments.dialogue import Dialogue
from posttrain_lib.schema.examples import Message
from tests.support.dialogues import tokenizer_of

#: prints reasoning of the last turn only
FORGETS = CHAT_TEMPLATE.replace(
    "(message.content or '')",
    "((message.content or '') if message.role != 'assistant' or loop.last else message.content.split('</think>')[-1])",
)
#: prints which turn it is from the end
COUNTS = CHAT_TEMPLATE.replace("message.role + '\\n'", "message.role + (loop.revindex | string) + '\\n'")
#: looks back: a tool's answer has another header behind a turn that reasons
LOOKS_BACK = CHAT_TEMPLATE.replace(
    "'<|im_start|>' + message.role",
    "'<|im_start|>' + ('!' if loop.index0 and 'think' in messages[loop.index0 - 1].content else '') + message.role",
)
ENDLESS = CHAT_TEMPLATE.replace("{{- '<|im_end|>\\n' }}", "{{- '\\n' }}")


def dialogue(tokenizer: ChatTokenizer, *roles: str) -> Dialogue:
    return Dialogue(tokenizer, roles, (), stop_ids(tokenizer), "the template")


def changed(talker: Path, folder: Path, template: str) -> ChatTokenizer:
    (folder / "changed.jinja").write_text(template)
    return tokenizer_of(talker, folder / "changed.jinja")


def test_it_is_what_serving_sends(tokenizer: ChatTokenizer) -> None:
    """Whether the policy ended its turn or was cut off."""
    between = dialogue(tokenizer, "tool", "user")
    asked = [Message("user", "How many?")]
    prompt = tokenizer.encode(tokenizer.render(asked, answer_next=True)).ids.tolist()
    said = tokenizer.encode("Let me see.").ids.tolist()
    (end,) = tokenizer.encode("<|im_end|>").ids.tolist()
    for messages in ([Said("tool", "72")], [Said("tool", "a"), Said("tool", "b\n")], [Said("user", " Go on. ")]):
        told = [Message(message.role, message.content) for message in messages]
        served = tokenizer.render([*asked, Message("assistant", "Let me see."), *told], answer_next=True)
        expected = tokenizer.encode(served).ids.tolist()
        assert prompt + said + between.following(messages, said[-1]) == expected
        assert [*prompt, *said, end, *between.following(messages, end)] == expected


@pytest.mark.parametrize("template", [FORGETS, COUNTS, LOOKS_BACK], ids=["forgets", "counts", "looks back"])
def test_a_template_that_rewrites_history_is_refused(template: str, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rewrites history") as found:
        dialogue(changed(talker, tmp_path, template), "tool")
    assert found.value.where == "the template" and found.value.fix is not None


def test_a_template_that_ends_no_turn_is_refused(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not end a turn"):
        dialogue(changed(talker, tmp_path, ENDLESS), "tool")


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ConfigError, match="in which judge answers"):
        dialogue(tokenizer, "judge")


def test_control_tokens_in_what_is_said_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(RefusedRow, match="im_start"):
        dialogue(tokenizer, "tool").following([Said("tool", "<|im_start|>user")], 0)


def test_words_keep_markers_but_the_last(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>").ids.tolist()
    between = dialogue(tokenizer, "tool")
    assert between.words(ids) == "a<|im_start|>b" == between.words(ids[:-1])
    assert between.words([]) == ""


#: template -> role -> None, or what is said of it
PUBLISHED: dict[str, dict[str, str | None]] = {
    "qwen3_instruct_2507.jinja": {"tool": None, "user": None},
    "smollm3.jinja": {"user": None},
    "deepseekv3.jinja": {"user": "rewrites history"},
}


@pytest.mark.parametrize(("name", "role"), [(name, role) for name, roles in PUBLISHED.items() for role in roles])
def test_published_templates(name: str, role: str, real_data: Path) -> None:
    tokenizer = ChatTokenizer(
        real_data / "tokenizers" / "qwen3", chat_template=real_data / "chat_templates" / name, engine="hf"
    )
    if (said := PUBLISHED[name][role]) is None:
        dialogue(tokenizer, role)
        return
    with pytest.raises(ConfigError, match=said):
        dialogue(tokenizer, role)


def test_qwen3_forgets_its_reasoning_once_a_user_speaks(real_data: Path) -> None:
    """A plain turn gets an empty think block where it is the last; behind a tool it stands as it was."""
    tokenizer = ChatTokenizer(real_data / "tokenizers" / "qwen3", engine="hf")
    dialogue(tokenizer, "tool")
    with pytest.raises(ConfigError, match="rewrites history"):
        dialogue(tokenizer, "user")
