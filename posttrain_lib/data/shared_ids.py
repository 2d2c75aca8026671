"""Whether two tokenizers give one id one meaning, so that distributions over ids can be compared."""

from __future__ import annotations

from pathlib import Path

from posttrain_lib.data.chat_tokenizer import vocabulary_of
from posttrain_lib.errors import DataError


def check_shared_ids(own: Path | str, other: Path | str, *, where: str) -> None:
    """Refuse another model's tokenizer unless every token of one's own has the same id there.

    The other may know more tokens, at ids behind one's own; nothing is said about how text is cut.

    Args:
        own, other: tokenizer folders. where: the field of the run file that names the other.

    Raises:
        DataError: naming the first token whose ids differ.
    """
    ours, theirs = vocabulary_of(own), vocabulary_of(other)
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            found = f"id {theirs[token]}" if token in theirs else "no such token"
            raise DataError(
                "the two models have different tokenizers, so their distributions cannot be compared",
                where=f"{where}: {other}",
                got=f"{found} for {token!r}",
                expected=f"id {index}, as in {own}",
                fix="take a model of the same tokenizer, or train on text that the other wrote (recipe sft)",
            )
