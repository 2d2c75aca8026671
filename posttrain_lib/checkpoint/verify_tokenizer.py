"""Whether a folder's tokenizer fits its model: every id that it can give must have a row in the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import ModelSpec


def check_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Hold the ids of ``tokenizer.json`` against the model's vocabulary; a folder without that file passes.

    Raises:
        ModelError: the file is broken, or has a token whose id lies beyond the embedding.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        tokens = _tokens(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "tokenizer.json cannot be read", where=path, got=error, fix="fetch the folder again"
        ) from error
    beyond = sorted((number, token) for token, number in tokens.items() if number >= spec.config.vocab_size)
    if beyond:
        number, token = beyond[0]
        raise ModelError(
            f"the tokenizer is larger than the embedding: {len(beyond)} of its tokens have no row",
            where=f"{path}: {token!r}",
            got=f"id {number}, the largest is {beyond[-1][0]}",
            expected=f"ids below {spec.config.vocab_size}, the model's vocab_size",
            fix="use the tokenizer that the model was made with; new tokens are added with the model's vocabulary",
        )


def _tokens(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id: a vocabulary is an object, or a list in the order of its ids (unigram)."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {str(token): int(number) for token, number in vocabulary.items()}
    else:
        tokens = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    tokens.update({str(added["content"]): int(added["id"]) for added in content.get("added_tokens") or ()})
    return tokens
