"""A Hugging Face tokenizer together with its chat template: the only source of ids and of rendered text.

Serving loads the same files through the same class, so training and serving cannot drift apart.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2

from posttrain_lib.data.engine_gate import GateReport, choose_engine
from posttrain_lib.data.engine_texts import SAMPLES
from posttrain_lib.data.engines import Encoded, Engine, GigatokenEngine, HfEngine
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Message

#: what a template raises on messages that it was not made for: its own refusals and the slips of template code
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)

#: characters that the reference reads before a faster engine is made: making and proving one takes about as long
WORTH_AN_ENGINE = 1_000_000

#: one of these is what AutoTokenizer makes a tokenizer of; without any, some classes make an empty one
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip
#: special tokens that a template knows by these names; tokenizer_config.json says which they are
_PRINTED_BY_TEMPLATES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SHOWN_NAMES = 6

Variables = Mapping[str, Any]

#: an added token that is not special is a marker all the same where it is a word in brackets: <tool_call>, </s>
_BRACKETED = re.compile(r"[<\[{|\uff5c].*\w.*[>\]}|\uff5c]", re.DOTALL)
#: but for HTML tags, which some vocabularies (Gemma's) add to spell text in fewer tokens; <s> is a marker elsewhere
_HTML = re.compile(
    "</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|p|br|hr|div|span|blockquote|ul|ol|li|dl|dt|dd|strong|em|b|i|u"
    "|sub|sup|code|pre|a|img)>"
)


class ChatTokenizer:
    """Renders conversations as serving would, and encodes text.

    Args:
        folder: Hugging Face tokenizer folder.
        chat_template: Jinja file that replaces the tokenizer's own template.
        template_date: ISO date that templates print where they ask for today's.
        template_kwargs: further variables for the template.
        engine: "hf" for the reference alone; "auto" for a faster one where that gives the same ids and offsets on
            every text of the gate, once there is enough text to be worth it.
        verdict: what the gate said of these files in another process: then a worker starts with the faster engine.

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
        engine: Literal["auto", "hf"] = "auto",
        verdict: GateReport | None = None,
    ) -> None:
        self._tokenizer = _load(folder)
        self._words = _added_words(folder)
        self._reference = HfEngine(self._tokenizer)
        self._reference_only = engine == "hf"
        self._engine: Engine | None = self._reference if self._reference_only else None
        self._verdict = verdict
        self._characters_read = 0
        self._template: str | None = None if chat_template is None else read_template(chat_template)
        date = datetime.date.fromisoformat(template_date)
        # Hugging Face's templates call strftime_now; a variable of that name takes precedence over the function.
        self._variables = {"strftime_now": date.strftime, **(template_kwargs or {})}
        self._mentioned: dict[str, bool] = {}
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
        return self._engine_for(len(text)).encode_with_offsets(text)

    def gate_verdict(self) -> GateReport | None:
        """Whether a faster engine gives the same; asks where that has not been done. None with ``engine="hf"``."""
        if self._engine is None:
            self._choose_engine()
        return self._verdict

    @property
    def engine_report(self) -> dict[str, Any]:
        """For lineage: which engine reads, why, what the gate said, and the texts that the reference read instead."""
        used = self._engine or self._reference
        if self._reference_only:
            reason = "asked for"
        elif self._engine is None:
            reason = f"fewer than {WORTH_AN_ENGINE} characters read"
        else:
            reason = "" if self._verdict is None else self._verdict.reason
        return {
            "engine": used.name,
            "version": used.version,
            "reason": reason,
            "gate": None if self._verdict is None else self._verdict.as_dict(),
            "fallbacks": dict(used.fallbacks) if isinstance(used, GigatokenEngine) else {},
        }

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token by itself, for display; a character cut in two shows as U+FFFD."""
        return [self.decode([token], skip_special_tokens=False) for token in ids]

    @property
    def vocabulary_size(self) -> int:
        """Ids that it knows, added tokens among them."""
        return len(self._tokenizer)

    @cached_property
    def writes_bos(self) -> bool:
        """Whether it puts its begin of sequence before a text of its own accord: found out by trying."""
        return self.bos_id is not None and self._tokenizer("a")["input_ids"][:1] == [self.bos_id]

    def to_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` would have it, as the class that serving loads has made it."""
        return str(self._tokenizer.backend_tokenizer.to_str())

    def definition(self) -> dict[str, str]:
        """What decides ids and rendered text, as text: the tokenizer with the names of its special tokens, which
        templates print, and the template with its variables."""
        special = {name: getattr(self._tokenizer, name) for name in _PRINTED_BY_TEMPLATES}
        template = self._template or self._tokenizer.chat_template
        variables = {
            name: value if not callable(value) else value("%Y-%m-%d") for name, value in self._variables.items()
        }
        return {
            "tokenizer": f"{self.to_json()}\n{json.dumps(special)}",
            "template": json.dumps([template, variables], sort_keys=True, default=str),
        }

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
        return any_of(token.content for token in added if token.special)

    @cached_property
    def markers(self) -> Mapping[str, bool]:
        """Added tokens that mean something to a model -> whether they are special tokens.

        All special tokens, and every other whose text is a word in brackets and no HTML tag. Runs of spaces and plain
        words, which some vocabularies add to spell them in fewer tokens, are text.
        """
        added, words = self._tokenizer.added_tokens_decoder.values(), self._words
        return {
            token.content: token.special
            for token in added
            if token.special or (_is_marker(token.content) and token.content not in words)
        }

    @cached_property
    def marker(self) -> re.Pattern[str] | None:
        """Matches a marker; None where the tokenizer has none."""
        return any_of(self.markers)

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence id."""
        return self._tokenizer.eos_token_id

    @property
    def pad_id(self) -> int | None:
        """Padding id."""
        return self._tokenizer.pad_token_id

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text; None where the vocabulary lacks it."""
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found

    def mentions(self, variable: str) -> bool:
        """Whether the template uses a variable of this name, not fixed by the run's own template variables."""
        if variable not in self._mentioned:  # asked for every turn
            source = self._template or self._tokenizer.chat_template
            text = source if isinstance(source, str) else "\n".join(source.values())
            found = re.search(rf"\b{re.escape(variable)}\b", text) is not None
            self._mentioned[variable] = found and variable not in self._variables
        return self._mentioned[variable]

    def _engine_for(self, characters: int) -> Engine:
        if self._engine is not None:
            return self._engine
        self._characters_read += characters
        if self._verdict is None and self._characters_read < WORTH_AN_ENGINE:
            return self._reference
        return self._choose_engine()

    def _choose_engine(self) -> Engine:
        engine, self._verdict = choose_engine(self._tokenizer, self._samples(), self._verdict)
        self._engine = engine
        return engine

    def _samples(self) -> list[str]:
        """Conversations as this template renders them, for the gate; those that it refuses are left out."""
        rendered = []
        for messages, tools in SAMPLES:
            for answer_next in (False, True):
                with contextlib.suppress(RefusedRow):
                    rendered.append(self.render(messages, tools, answer_next=answer_next))
        return rendered

    def __getstate__(self) -> dict[str, Any]:
        """All but the engine, which a process makes for itself; the verdict goes along."""
        return {**self.__dict__, "_engine": self._reference if self._reference_only else None}

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


def any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Matches one of the names, the longest where several stand in a place; None without names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _is_marker(content: str) -> bool:
    content = content.strip()
    return _BRACKETED.fullmatch(content) is not None and _HTML.fullmatch(content) is None


def vocabulary_of(folder: str | Path) -> dict[str, int]:
    """Token -> id of a tokenizer folder; it needs no template."""
    found: dict[str, int] = _load(Path(folder)).get_vocab()
    return found


def _load(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    check_files(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (
        Exception
    ) as error:  # tokenizers raises plain ones, and configuration classes check fields in ways of their own
        raise _not_loaded(Path(folder), error) from error
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


def check_files(folder: Path) -> None:
    """DataError where a local folder cannot be a tokenizer's, in the words that AutoTokenizer has not."""
    if not folder.exists():
        return  # a hub id, or AutoTokenizer says that there is nothing
    if not folder.is_dir():
        raise DataError(
            "the tokenizer is a file, not a folder",
            where=folder,
            fix="name the folder that the tokenizer's files lie in",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        names = sorted(path.name for path in folder.iterdir())
        raise DataError(
            "the folder has no tokenizer",
            where=folder,
            got=", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "") or "an empty folder",
            expected="tokenizer.json, with tokenizer_config.json beside it",
            fix="put the tokenizer's files there, or name a folder that has them in data.tokenizer",
        )
    for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        _check_json(folder / name)


def _check_json(path: Path) -> None:
    """DataError unless a file holds a JSON object, or is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = None if isinstance(content, dict) else f"a JSON {type(content).__name__}"
    except (OSError, ValueError) as error:
        found = str(error)
    if found is not None:
        raise DataError(
            "a file of the tokenizer's folder is broken",
            where=path,
            got=found,
            expected="a JSON object",
            fix="fetch the file again",
        )


def _not_loaded(folder: Path, error: Exception) -> DataError:
    """What to say where AutoTokenizer gives up: it reads config.json too, whose faults are not the tokenizer's."""
    from transformers import AutoConfig

    got = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if (folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(folder)
        except Exception as refusal:  # as above
            return DataError(
                "the tokenizer cannot be loaded, because transformers refuses the config.json beside it",
                where=folder / "config.json",
                got=f"{type(refusal).__name__}: {' '.join(str(refusal).split())}",
                fix="correct that field, or name a folder with the tokenizer's files alone in data.tokenizer",
            )
    return DataError(
        "the tokenizer cannot be loaded", where=folder, got=got, fix="name a Hugging Face tokenizer folder"
    )


def _added_words(folder: Path | str) -> frozenset[str]:
    """Tokens that were added to the folder as text, by the record that ``models.growth`` leaves beside them."""
    path = Path(folder) / "added_vocabulary.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return frozenset(token["token"] for record in records for token in record["tokens"] if not token["special"])


def read_template(path: Path | str) -> str:
    """A template file's text. DataError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the chat template cannot be read", where=path, got=error, fix="name a Jinja file in data.chat_template"
        ) from error
