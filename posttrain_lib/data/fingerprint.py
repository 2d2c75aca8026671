"""What made the token ids of a data set, as digests: training must use the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from posttrain_lib.errors import DataError

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.token_store import TokenStore


def fingerprint(tokenizer: ChatTokenizer) -> dict[str, str]:
    """sha256 of the tokenizer as it encodes (its model, pre-tokeniser, added tokens, which of them are begin and end
    of sequence, unknown and padding) and of the template with its date and variables; file layout and formatting do not
    matter."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in tokenizer.definition().items()}


def check_fingerprint(store: TokenStore, expected: Mapping[str, str]) -> None:
    """Refuse to train on ids that another tokenizer or template made.

    Raises:
        DataError: naming which of the two differs.
    """
    for name, digest in expected.items():
        found = store.fingerprint.get(name)
        if found != digest:
            raise DataError(
                f"the data was prepared with another {name} than the run's",
                where=store.folder,
                got=f"{name} {found[:12] if found else 'not stated'}",
                expected=f"{name} {digest[:12]}",
                fix="prepare the data again with this run's tokenizer and template",
            )
