"""The real templates that the data tests run on, and tokenizers for those whose vocabulary is not at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

#: what looks like a marker in a template: <|eot_id|>, <end_of_turn>, <｜User｜>, but not a word of a tool's XML
_MARKERS = re.compile(r"<[|｜][^<>|｜'\"]+[|｜]>|<(?:start|end)_of_turn>")
OWN_TOKENIZER = ("qwen3", "qwen2.5", "gpt-oss", "mistral-v3", "phi-3-mini")
TEMPLATE_ONLY = (
    "deepseekv3", "gemma", "gemma3", "llama3", "llama3_1", "llama3_2", "qwen3_instruct_2507", "smollm3",
)  # fmt: skip
EVERY_TEMPLATE = OWN_TOKENIZER + TEMPLATE_ONLY


def with_markers(base: Path, template: Path, out: Path) -> Path:
    """A tokenizer folder: ``base``'s vocabulary, the template, and a special token for every marker in it."""
    out.mkdir()
    text = template.read_text(encoding="utf-8")
    vocabulary = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    next_id = 1 + max(token["id"] for token in vocabulary["added_tokens"])
    known = {token["content"] for token in vocabulary["added_tokens"]}
    for marker in [*dict.fromkeys(_MARKERS.findall(text)), "<bos>"]:
        if marker not in known:
            entry = {"id": next_id, "content": marker, "special": True}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            vocabulary["added_tokens"].append({**entry, **flags})
            next_id += 1
    (out / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (out / "chat_template.jinja").write_text(text, encoding="utf-8")
    return out
