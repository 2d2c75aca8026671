"""The trained tokenizer: byte-identical for the same texts, a Hugging Face folder, a template true to the turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, build_tokenizer
from posttrain_lib.errors import DataError

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ROWS = 300


def _texts(rows: int = ROWS) -> list[str]:
    return [message["content"] for row in generate_rows(rows, 0) for message in row["messages"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(_texts(), 600, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_files_are_those_of_transformers_and_byte_identical_in_another_process(folder: Path, tmp_path: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    code = (
        "import sys; from pathlib import Path\n"
        "from posttrain_lib.embedded.conversations import generate_rows\n"
        "from posttrain_lib.embedded.tokenizer import build_tokenizer\n"
        f"texts = [m['content'] for row in generate_rows({ROWS}, 0) for m in row['messages']]\n"
        f"build_tokenizer(texts, 600, Path({str(tmp_path)!r}))\n"
    )
    # Another hash seed and several threads: neither may decide a merge.
    environment = {**os.environ, "PYTHONHASHSEED": "17", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_special_tokens(tokenizer) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) <= 600 and tokenizer.is_fast
    config = json.loads((Path(tokenizer.name_or_path) / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # what vLLM and older transformers know


@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer, text: str) -> None:
    # hypothesis draws no lone surrogates by default for utf-8 codecs; every other text is bytes, and bytes are tokens.
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text) or any(token in text for token in SPECIAL_TOKENS):
        return
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_template_says_every_role(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}],
        },
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\nIt is blue.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    # A prompt is a prefix of the conversation, in ids as well: generation starts where training did.
    assert text.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    encoded = [tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text)]
    assert encoded[1][: len(encoded[0])] == encoded[0]


def test_tools_join_the_system_turn(tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]
    talk = [{"role": "user", "content": "Hi."}]
    bare = tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)
    with_system = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S."}, *talk], tools=tools, tokenize=False
    )
    assert bare.startswith("<|im_start|>system\nTools:\n{") and bare.count("<|im_start|>system") == 1
    assert with_system.startswith("<|im_start|>system\nS.\n\nTools:\n{") and with_system.count("S.") == 1


def test_an_unknown_role_is_refused(tokenizer) -> None:
    with pytest.raises(Exception, match="unknown role: narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once."}], tokenize=False)


def test_the_default_words_are_one_token_each(tokenizer) -> None:
    for word in ("garden", "purple", "Wednesday", "Mira"):
        assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


@pytest.mark.parametrize(("texts", "size"), [([], 600), (["", ""], 600), (["text"], SMALLEST_VOCABULARY - 1)])
def test_nothing_to_train_on_is_refused(tmp_path: Path, texts: list[str], size: int) -> None:
    with pytest.raises(DataError):
        build_tokenizer(texts, size, tmp_path / "out")
    assert not (tmp_path / "out").exists()
