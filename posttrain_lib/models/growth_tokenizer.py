"""New tokens in a tokenizer's files, behind all that it has: nothing else of them changes.

The files are edited, not written anew by ``save_pretrained``: that drops settings of older formats (``add_bos_token``,
``legacy``), renames the class, and for some tokenizers (Phi-3's) writes another normaliser. What was edited is then
read by the class that serving uses, and must be the old tokenizer and the new tokens, nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ModelError

_TOKENIZER, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"


@dataclass(frozen=True)
class NewToken:
    """A token to add.

    ``special``: a control token, which decoding leaves out; else it is text. ``description``: its rows begin as the
    mean of this text's tokens.
    """

    token: str
    special: bool = False
    description: str | None = None


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as serving loads it.

    Raises:
        ModelError: there is none, or none with a ``tokenizer.json``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "the vocabulary cannot grow: the model folder's tokenizer cannot be loaded",
            where=folder,
            got=error,
            fix="put the tokenizer's files beside the weights",
        ) from error
    if not tokenizer.is_fast or not (folder / _TOKENIZER).is_file():
        raise ModelError(
            "the vocabulary cannot grow: the tokenizer has no file that new tokens could be written to",
            where=folder / _TOKENIZER,
            got=type(tokenizer).__name__,
            expected=f"a tokenizer with a {_TOKENIZER}",
            fix="save it once with AutoTokenizer.from_pretrained(...).save_pretrained(...), which writes that file",
        )
    return tokenizer


def check_new(tokenizer: Any, tokens: Sequence[NewToken]) -> None:
    """Refuse tokens that are empty, named twice, or known already, and an empty list of them.

    Raises:
        ModelError: naming the first.
    """
    if not tokens:
        raise ModelError("there are no tokens to add", where="model.vocabulary", fix="name at least one")
    known, seen = tokenizer.get_vocab(), set[str]()
    for token in tokens:
        problem = None
        if not token.token.strip():
            problem = "a new token is empty"
        elif token.token in seen:
            problem = "a new token is named twice"
        elif token.token in known:
            problem = "a new token is in the vocabulary already"
        if problem is not None:
            raise ModelError(
                problem,
                where="model.vocabulary",
                got=repr(token.token),
                expected="text that the tokenizer does not know as one token",
                fix="leave it out, or choose another name",
            )
        seen.add(token.token)


def first_free_id(tokenizer: Any) -> int:
    """The id that the next token gets: behind all others."""
    return 1 + max(tokenizer.get_vocab().values())


def add_to_files(folder: Path, tokens: Sequence[NewToken], first_id: int) -> None:
    """Write the tokens into the folder's tokenizer files, with ids from ``first_id`` on.

    ``normalized`` is off: a token is found where its very characters stand, whatever the tokenizer does to text.
    """
    entries = [
        {
            "content": token.token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.special,
        }
        for token in tokens
    ]
    numbered = list(enumerate(entries, start=first_id))
    content = _read(folder / _TOKENIZER)
    content.setdefault("added_tokens", []).extend({"id": index, **entry} for index, entry in numbered)
    _write(folder / _TOKENIZER, content)
    settings = _read(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"].update({str(index): entry for index, entry in numbered})
        listed = settings.get("additional_special_tokens")
        if isinstance(listed, list):
            listed.extend(token.token for token in tokens if token.special)
        _write(folder / _SETTINGS, settings)
    if (folder / _ADDED).is_file():  # how transformers kept them before version 4.34
        _write(folder / _ADDED, _read(folder / _ADDED) | {str(entry["content"]): index for index, entry in numbered})


def prove(folder: Path, before: Any, tokens: Sequence[NewToken], first_id: int) -> None:
    """Load the edited files and hold them against the old tokenizer: the same but for the new tokens, each one id.

    Raises:
        ModelError: they are not.
    """
    after = load_tokenizer(folder)
    ids = range(first_id, first_id + len(tokens))
    encoded = after([token.token for token in tokens], add_special_tokens=False)["input_ids"]
    wrong = [token.token for token, index, found in zip(tokens, ids, encoded, strict=True) if found != [index]]
    old, new = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (before, after))
    count = len(old["added_tokens"])
    changed = [name for name in old if name != "added_tokens" and old[name] != new[name]]
    changed += ["added_tokens"] if old["added_tokens"] != new["added_tokens"][:count] else []
    if wrong or changed or len(new["added_tokens"]) != count + len(tokens):
        raise ModelError(
            "the tokenizer does not take the new tokens as they were meant",
            where=folder / _TOKENIZER,
            got=f"other ids for {wrong[:3]}; changed parts {changed}",
            expected="the old tokenizer, and one id for each new token",
            fix="choose other names for the tokens, or add them to the tokenizer's files by hand",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("a file of the tokenizer is broken", where=path, got=error) from error
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
