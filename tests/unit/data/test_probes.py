"""What a template does, found out before the first row."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.probes import check_maskable, left_out, stop_ids
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Conversation, Message
from tests.unit.data.real_templates import EVERY_TEMPLATE

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_the_embedded_template_is_maskable_and_stops_at_its_marker(chatml: ChatTokenizer) -> None:
    check_maskable(chatml, "here")
    assert {chatml.decode([token], skip_special_tokens=False) for token in stop_ids(chatml)} == {"<|im_end|>"}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (f"{{% for m in messages %}}{TURN}{{% endfor %}}", "ignores add_generation_prompt"),
        (f"{{% for m in messages if m.role == 'user' %}}{TURN}{{% endfor %}}{ASK}", "prints nothing of message 1"),
        (f"{{{{ bos_token + '' }}}}{{% for m in messages %}}{TURN}{{% endfor %}}{ASK}", "bos_token"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{% for m in messages %}", "end of template"),
    ],
    ids=["no generation prompt", "answers dropped", "undefined variable", "refuses", "broken"],
)
def test_a_template_that_cannot_be_masked_is_refused(
    template: str, problem: str, with_template: Callable[..., ChatTokenizer]
) -> None:
    with pytest.raises(DataError, match="cannot be masked") as caught:
        check_maskable(with_template(template), "data.chat_template")
    assert problem in str(caught.value)
    assert "data.chat_template" in str(caught.value)


@pytest.mark.parametrize("name", EVERY_TEMPLATE)
def test_every_real_template_is_maskable(name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    check_maskable(real_tokenizer(name), name)


STOPS = {
    "qwen3": {"<|im_end|>"},
    "gpt-oss": {"<|return|>", "<|call|>"},
    "mistral-v3": {"</s>"},
    "phi-3-mini": {"<|end|>", "<|endoftext|>"},
    "llama3_1": {"<|eot_id|>", "<|endoftext|>"},
}


@pytest.mark.parametrize("name", STOPS)
def test_where_generation_stops(name: str, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = real_tokenizer(name)
    assert {tokenizer.decode([token], skip_special_tokens=False) for token in stop_ids(tokenizer)} == STOPS[name]


def test_what_a_template_leaves_out_in_silence(with_template: Callable[..., ChatTokenizer]) -> None:
    tokenizer = with_template(f"{{% for m in messages if m.role in ['user', 'assistant'] %}}{TURN}{{% endfor %}}{ASK}")
    asked, answer = Message("user", "a"), Message("assistant", "b")
    plain = Conversation("s", "1", (asked, answer))
    assert left_out(tokenizer, plain) is None
    assert left_out(tokenizer, Conversation("s", "1", (Message("system", "c"), asked, answer))) == "system turn"
    assert left_out(tokenizer, Conversation("s", "1", (asked, answer, Message("tool", "c"), answer))) == "tool turns"
    assert left_out(tokenizer, Conversation("s", "1", (asked, answer), tools=({"name": "f"},))) == "tools"
