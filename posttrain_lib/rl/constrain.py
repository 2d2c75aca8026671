"""Constraints as a run file names them: what a completion may be, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.registry import check_options, resolve
from posttrain_lib.rl.constraints import Trie

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.rl.prompts import RolloutPrompt
    from posttrain_lib.schema.rollouts import AllowedTokens

#: name -> what makes a Constrain of a ChatTokenizer and options; a run file may name another as module:attribute
CONSTRAINTS: dict[str, str] = {"trie": "posttrain_lib.rl.constrain:Catalogue"}

#: what may be sampled for a prompt; None: anything. In an episode of several turns it holds for each of them.
Constrain = Callable[["RolloutPrompt"], "AllowedTokens | None"]


@dataclass(frozen=True)
class ConstraintSpec:
    """A key of ``CONSTRAINTS`` or ``module:attribute``, and keyword arguments beside the tokenizer."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def make_constrain(spec: ConstraintSpec, tokenizer: ChatTokenizer) -> Constrain:
    """The constraint of a run.

    Raises:
        ConfigError: no such constraint, or options that it does not take; and what it raises.
    """
    made: Constrain = named_constraint(spec)(tokenizer, **spec.options)
    return made


def named_constraint(spec: ConstraintSpec) -> Any:
    """What makes the constraint of a spec, which takes the spec's options; nothing is made.

    Raises:
        ConfigError: no such constraint, or options that it does not take.
    """
    where = "grpo.constraint"
    named: Any = resolve(spec.name, CONSTRAINTS, what="constraint", where=f"{where}.name")
    check_options(named, spec.options, what="constraint", where=f"{where}.options", leading=1)
    if named is Catalogue:
        named.check(**spec.options)
    return named


class Catalogue:
    """Answers are entries of a catalogue, each followed by the end of sequence.

    Args:
        entries: texts, the same for every prompt. field: of the rows that holds each one's own. One of the two.

    Raises:
        ConfigError: both or neither, no text among them, or a tokenizer without an end of sequence.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, entries: Sequence[str] = (), field: str | None = None) -> None:
        self.check(entries=entries, field=field)
        if tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer has no end of sequence, which ends an entry of a catalogue", where="grpo.constraint"
            )
        self._tokenizer, self._end, self._field = tokenizer, tokenizer.eos_id, field
        self._shared = self._trie(entries) if entries else None

    @staticmethod
    def check(*, entries: Sequence[str] = (), field: str | None = None) -> None:
        """That these are options of a catalogue.

        Raises:
            ConfigError: both or neither, or an entry that is no text.
        """
        if strange := [entry for entry in entries if not isinstance(entry, str)]:
            raise ConfigError(
                "an entry of a catalogue is no text",
                where="grpo.constraint.options.entries",
                got=f"{strange[0]!r}, a {type(strange[0]).__name__}",
                expected="a text",
                fix="write it in quotes: yes, no and numbers are none in YAML without",
            )
        if bool(entries) == (field is not None):
            raise ConfigError(
                "a catalogue is the run's, or each row's",
                where="grpo.constraint.options",
                got=f"{len(entries)} entries, field {field}",
                expected="entries, or the field of the rows that holds them",
            )

    def __call__(self, prompt: RolloutPrompt) -> Trie:
        """The prompt's catalogue. DataError where its row has none."""
        if self._shared is not None:
            return self._shared
        assert self._field is not None
        entries = prompt.extra.get(self._field)
        if not isinstance(entries, list) or not entries or not all(isinstance(text, str) for text in entries):
            raise DataError(
                "a row has no catalogue of answers",
                where=f"{prompt.name}, field {self._field!r}",
                got=repr(entries)[:100],
                expected="a list of texts",
            )
        return self._trie(entries)

    def _trie(self, entries: Sequence[str]) -> Trie:
        return Trie([self._tokenizer.encode(text).ids.tolist() for text in entries], self._end)
