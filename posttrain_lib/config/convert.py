"""A run file of the conversion flow: which model, and who looks for its definition where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section, TaggedSection
from posttrain_lib.config.load import build_config, parse_config
from posttrain_lib.config.model import ModelConfig


class SearchAgentConfig(TaggedSection):
    """Searches the options of the blocks; needs no model and no network."""

    kind: Literal["search"] = "search"


class LLMAgentConfig(TaggedSection):
    """A language model: behind an OpenAI-compatible endpoint, or a command."""

    kind: Literal["llm"] = "llm"
    base_url: str | None = Field(None, description="of the endpoint, as http://127.0.0.1:8000/v1")
    model: str | None = Field(None, description="its name there")
    api_key_variable: str | None = Field(
        None, description="environment variable that holds the key; it is never stored"
    )
    command: tuple[str, ...] | None = Field(None, description="reads the brief on stdin, writes the file to stdout")
    timeout_seconds: float = Field(300.0, gt=0, description="for one answer")
    retries: int = Field(3, ge=0, description="further tries where the endpoint fails")
    temperature: float = Field(0.2, ge=0)
    max_tokens: int = Field(8192, ge=256)

    @model_validator(mode="after")
    def _one_way(self) -> LLMAgentConfig:
        if (self.base_url is None) == (self.command is None):
            raise ValueError("an llm agent needs exactly one of 'base_url' and 'command'")
        if self.base_url is not None and self.model is None:
            raise ValueError("an endpoint needs 'model', the model's name there")
        return self


class AttemptLimits(Section):
    """What one attempt may use; the gate's memory is model.verification.memory_limit_gib."""

    proposal_seconds: float = Field(20.0, gt=0, description="for reading config.json by the proposed file")
    proposal_memory_gib: float = Field(1.0, gt=0)
    gate_seconds: float = Field(1800.0, gt=0)


class ConversionConfig(Section):
    """How the definition of an unknown architecture is looked for."""

    agent: SearchAgentConfig | LLMAgentConfig = Field(SearchAgentConfig(), discriminator="kind")
    max_attempts: int = Field(60, ge=1)
    max_seconds: float = Field(7200.0, gt=0, description="no attempt begins after this")
    limits: AttemptLimits = AttemptLimits()
    treat_as_unknown: tuple[str, ...] = Field(
        (), description="families (model_type) that count as unknown, to see whether they would be found"
    )


class NoData(Section):
    """What the steps that a conversion shares with training read of the data section: nothing."""

    sources: tuple[()] = ()
    tokenizer: None = None
    chat_template: None = None


class ConvertConfig(Section):
    """Everything a conversion depends on."""

    recipe: Literal["convert"] = "convert"
    name: str = Field("convert", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    model: ModelConfig
    conversion: ConversionConfig = ConversionConfig()

    @property
    def data(self) -> NoData:
        """For the steps that are shared."""
        return NoData()

    @property
    def companion(self) -> None:
        """For the steps that are shared: nothing is compared with."""
        return None


def parse_convert_config(text: str, *, where: str = "config", overrides: Sequence[str] = ()) -> ConvertConfig:
    """From YAML text: expand ``${VARIABLE}``, apply ``section.key=value`` overrides, validate.

    Raises:
        ConfigError: no YAML mapping, or an unknown key or impossible value.
    """
    return parse_config(ConvertConfig, text, where=where, overrides=overrides)


def build_convert_config(raw: dict[str, Any], *, where: str = "config", overrides: Sequence[str] = ()) -> ConvertConfig:
    """The same of a plain mapping."""
    return build_config(ConvertConfig, raw, where=where, overrides=overrides)
