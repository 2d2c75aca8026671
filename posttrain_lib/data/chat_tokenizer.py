"""A Hugging Face tokenizer together with its chat template: the only source of ids and of rendered text.

Serving loads the same files through the same class, so training and serving cannot drift apart.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Message

#: what a template raises on messages that it was not made for: its own refusals and the slips of template code
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Token ids int64 [S] of a text, and where in it (character from, character to) each token stands, int64 [S]."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class ChatTokenizer:
    """Renders conversations as serving would, and encodes text.

    Args:
        folder: Hugging Face tokenizer folder.
        chat_template: Jinja file that replaces the tokenizer's own template.
        template_date: ISO date that templates print where they ask for today's.
        template_kwargs: further variables for the template.

    Raises:
        DataError: no tokenizer there, none of the fast kind, or no template.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        chat_template: Path | str | None = None,
        template_date: str = "2026-01-01",
        template_kwargs: Variables | None = None,
    ) -> None:
        self._tokenizer = _load(folder)
        self._template: str | None = None if chat_template is None else _read_template(chat_template)
        date = datetime.date.fromisoformat(template_date)
        # Hugging Face's templates call strftime_now; a variable of that name takes precedence over the function.
        self._variables = {"strftime_now": date.strftime, **(template_kwargs or {})}
        if self._template is None and self._tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template",
                where=folder,
                expected="a chat_template in tokenizer_config.json, or chat_template.jinja beside it",
                fix="name a Jinja file in data.chat_template",
            )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer_next: bool = False,
        variables: Variables | None = None,
    ) -> str:
        """The conversation as text. ``answer_next`` adds what serving puts before the model's answer.

        Raises:
            RefusedRow: the template cannot or will not render it.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template,
                add_generation_prompt=answer_next,
                tokenize=False,
                **{**self._variables, **(variables or {})},
            )
        except _TEMPLATE_ERRORS as error:
            raise RefusedRow("template_refuses", str(error).splitlines()[0] if str(error) else repr(error)) from error
        if not isinstance(rendered, str):
            raise RefusedRow("template_refuses", f"the template gave a {type(rendered).__name__}")
        return rendered

    def encode(self, text: str) -> Encoded:
        """Ids of exactly this text: nothing is added before or behind, markers in it become their tokens."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(np.asarray(found["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token by itself, for display; a character cut in two shows as U+FFFD."""
        return [self.decode([token], skip_special_tokens=False) for token in ids]

    @property
    def bos_id(self) -> int | None:
        """Begin-of-sequence id."""
        return self._tokenizer.bos_token_id

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the markers that no ordinary text encodes to."""
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(index for index, token in added if token.special)

    @cached_property
    def special_token(self) -> re.Pattern[str] | None:
        """Matches a special token; None where the tokenizer has none."""
        added = self._tokenizer.added_tokens_decoder.values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id."""
        return self._tokenizer.eos_token_id

    def mentions(self, variable: str) -> bool:
        """Whether the template uses a variable of this name, not fixed by the run's own template variables."""
        source = self._template or self._tokenizer.chat_template
        text = source if isinstance(source, str) else "\n".join(source.values())
        return variable not in self._variables and re.search(rf"\b{re.escape(variable)}\b", text) is not None

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Some templates join a call's arguments to text, and so want them as JSON: found out by trying."""
        arguments = {"name": "f", "arguments": {"a": 1}}
        asked = {"role": "user", "content": "a"}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": arguments}]}
        try:
            self._tokenizer.apply_chat_template(
                [asked, call], chat_template=self._template, tokenize=False, **self._variables
            )
        except _TEMPLATE_ERRORS as error:
            return isinstance(error, TypeError)
        return False

    def _plain(self, message: Message) -> dict[str, Any]:
        """The message as templates expect it. Reasoning has two names in the field; a template reads one of them."""
        plain: dict[str, Any] = {"role": message.role, "content": message.content or "", **message.extra}
        if message.reasoning_content:
            plain["reasoning_content"] = plain["thinking"] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = [self._call(call) for call in message.tool_calls]
        return plain

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if not self._arguments_as_text:
            return dict(call)
        function = dict(call["function"])
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}


def _load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            "the tokenizer cannot be loaded", where=folder, got=error, fix="name a Hugging Face tokenizer folder"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer does not say where in the text its tokens stand, so no mask can be made",
            where=folder,
            got=type(tokenizer).__name__,
            expected="a tokenizer with a tokenizer.json",
            fix="save it once with AutoTokenizer.from_pretrained(...).save_pretrained(...), which writes that file",
        )
    tokenizer.model_max_length = 2**31  # how long an example may be is the run file's matter: no warnings
    return tokenizer


def _read_template(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the chat template cannot be read", where=path, got=error) from error
