"""The ``data`` section: where rows come from and how they become tokens."""

from __future__ import annotations

import datetime
import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain_lib.config.base import Section

#: what is generated -> the formats of which rows of it are made
GENERATED_FORMATS = {"events": ("messages", "preference"), "lookups": ("messages", "prompts")}


def check_source_name(name: str) -> str:
    """The name of a source, where it is not what the mean over all of them is called.

    Raises:
        ValueError: it is.
    """
    if name == "all":
        raise ValueError("'all' is what the mean over all sources is called: give the source another name")
    return name


class GeneratedConversations(Section):
    """Rows made by the project's own generator (the embedded default; needs no download)."""

    rows: int = Field(6000, ge=10, description="conversations to generate")
    seed: int = 0
    of: Literal["events", "lookups"] = Field(
        "events",
        description="events: conversations, every answer right; lookups: questions with one checkable answer (format "
        "prompts), or demonstrations of which three in ten are right (format messages)",
    )
    pairs: bool = Field(False, description="as pairs of a right and a wrong last answer, for format preference")


class Source(Section):
    """One named source of rows."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name shown in receipts and per-source losses"
    )
    path: str | None = Field(
        None,
        description="file, glob, (datasets) folder, fsspec URL, or hf://owner/name[@revision][?config=main&split=train]",
    )
    generate: GeneratedConversations | None = None
    format: str = Field("messages", description="row format; a name in posttrain_lib.data.formats")
    fields: dict[str, str] = Field(
        default_factory=dict, description="the format's field -> what the rows call it, as {prompt: question}"
    )

    @field_validator("name")
    @classmethod
    def _is_not_the_whole(cls, value: str) -> str:
        return check_source_name(value)

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.generate is None):
            raise ValueError("a source needs exactly one of 'path' and 'generate'")
        pairs = self.generate is not None and self.generate.pairs
        if self.generate is not None and pairs != (self.format == "preference"):
            raise ValueError("generate.pairs: true goes with format: preference, and the one needs the other")
        if self.generate is not None:
            made = GENERATED_FORMATS[self.generate.of]
            if self.format not in made and self.format in ("messages", "preference", "prompts"):
                raise ValueError(f"generate.of: {self.generate.of} makes rows of format {' or '.join(made)}")
        return self


class HeldOut(Section):
    """The held-out split: by hash of a group key, so that related rows never straddle it."""

    fraction: float = Field(0.05, gt=0.0, lt=0.5)
    group_field: str | None = Field(
        "group",
        description="row field naming the group; rows without it are grouped by their first user turn, and those "
        "without turns by their content",
    )
    seed: int = 0


class DataConfig(Section):
    """Everything that decides the token ids and loss weights on disk."""

    sources: tuple[Source, ...] = Field(min_length=1)
    tokenizer: str | None = Field(None, description="tokenizer folder or hub id; default: the model's own")
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's template")
    template_date: str = Field("2026-01-01", pattern=r"^\d{4}-\d{2}-\d{2}$", description="the date templates may print")
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="extra variables for the template")
    trained_turns: Literal["each", "last", "as_rendered"] = Field(
        "each",
        description="what to do where a template rewrites earlier turns: one example per trained turn, "
        "the last turn only, or the conversation as rendered once",
    )
    max_example_tokens: int = Field(1024, ge=8, description="longest example kept whole")
    over_length: Literal["refuse", "truncate_right", "truncate_left", "split"] = Field(
        "refuse", description="a longer one: quarantined, its end cut off, its start cut off, or cut into several"
    )
    train_on: Literal["all", "last", "without_tools", "flagged"] = Field(
        "all",
        description="assistant turns that are learned: all, the conversation's last, those that call no tool, "
        "or only those with train: true (or a weight)",
    )
    control_tokens: Literal["refuse", "as_text"] = Field(
        "refuse",
        description="words that spell a control token: the row is quarantined, since serving would obey them, "
        "or they are encoded as ordinary text",
    )
    deduplicate: bool = Field(False, description="keep one of several examples with the same token ids and weights")
    engine: Literal["auto", "hf"] = Field(
        "auto", description="tokenising engine; auto: the fast one where it proves equal to Hugging Face's"
    )
    workers: int | None = Field(None, ge=0, description="tokenising processes; default: one a core; 0: none")
    on_the_fly: bool = Field(
        False, description="training reads and tokenises the rows as it goes; only a sample is prepared beforehand"
    )
    on_the_fly_sample: int = Field(
        2000, ge=10, description="rows of each source that are checked beforehand, and give the held-out examples"
    )
    serving_check: Literal["vllm", "off"] = Field(
        "vllm", description="compare the prompts' token ids with those that vLLM makes of the same messages"
    )
    serving_accepts: tuple[Literal["ends_missing", "sent_beyond", "unchecked"], ...] = Field(
        (),
        description="failed parts of that comparison that the run goes on with: ends of turns that end no generation, "
        "text that serving sends and training never has, sources of which nothing could be compared",
    )
    serving_samples: int = Field(64, ge=1, description="rows in that comparison, at least one of every source")
    max_refused_fraction: float = Field(0.01, ge=0.0, lt=1.0, description="refused rows allowed before the flow stops")
    held_out: HeldOut = HeldOut()

    @field_validator("serving_check", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads an unquoted off as false."""
        return "off" if value is False else value

    @property
    def template_variables(self) -> list[str]:
        """What templates see besides the messages, as a key has it: a template prints a mapping in its order."""
        return [self.template_date, json.dumps(self.template_kwargs)]

    @field_validator("template_kwargs", mode="before")
    @classmethod
    def _as_json(cls, value: object) -> object:
        """As a flow hands the config on from step to step, and as a server gets it: a template is to see the same in
        either. What YAML reads as a date is its text."""
        return json.loads(json.dumps(value, default=str, allow_nan=False))

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_date(cls, value: object) -> str:
        """YAML reads an unquoted date as one."""
        return datetime.date.fromisoformat(str(value)).isoformat()

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self
