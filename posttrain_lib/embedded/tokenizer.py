"""A byte-level BPE tokenizer with a ChatML-style template, written as a Hugging Face folder.

The folder holds what ``transformers`` itself writes (``tokenizer.json``, ``tokenizer_config.json``,
``chat_template.jinja``), so ``AutoTokenizer.from_pretrained(folder)`` and vLLM load it offline. The same texts give
byte-identical files: the trainer is deterministic (it breaks ties by token id) and the JSON is written with fixed
key order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from posttrain_lib.errors import DataError

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START, TURN_END)

# 256 bytes and the special tokens; anything above is learned merges.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# Sequences longer than this are still encoded; transformers only warns. Matches no model: the model's own limit does.
MODEL_MAX_LENGTH = 131_072

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role: ' + message.role) }}
    {%- endif %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '<tool_call>' + ({'name': call.name, 'arguments': call.arguments} | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> None:
    """Train a byte-level BPE on ``texts`` and write it to ``out_dir`` as a Hugging Face tokenizer folder.

    Args:
        texts: message contents. Bytes are the base alphabet, so any later text can be encoded.
        vocab_size: entries in all, special tokens included; fewer come out where the texts have no more merges.
        out_dir: made if absent; existing files of the same names are replaced.

    Raises:
        DataError: no text at all, or ``vocab_size`` below the bytes plus the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            "the vocabulary is too small for a byte-level tokenizer",
            where="model.from_scratch.tokenizer_vocab_size",
            got=vocab_size,
            expected=f"at least {SMALLEST_VOCABULARY} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)",
        )
    words = [text for text in texts if text]
    if not words:
        raise DataError("there is no text to train a tokenizer on", where=out_dir, got="0 non-empty texts")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The template's own words ride along, so that a turn's header costs few tokens.
    words.extend(["system\n", "user\n", "assistant\n", "tool\n"] * max(1, len(words) // 8))
    tokenizer.train_from_iterator(words, trainer, length=len(words))

    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    settings = {
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
