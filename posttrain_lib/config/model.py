"""The ``model`` section: a Hugging Face folder, or one made from scratch; and its verification."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section


class FromScratch(Section):
    """A randomly initialised model, written as a Hugging Face folder before anything else happens."""

    family: str = Field("qwen3", description="a name in posttrain_lib.models.families")
    architecture: dict[str, Any] = Field(
        description="fields of the family's transformers configuration (hidden_size, ...); vocab_size comes from "
        "the tokenizer"
    )
    tokenizer: str | None = Field(None, description="tokenizer folder or hub id; default: train a byte-level BPE")
    tokenizer_vocab_size: int = Field(512, ge=300, description="size of the byte-level BPE when one is trained")
    seed: int = 0


class VerificationConfig(Section):
    """The gate between a model folder and training. It cannot be turned off."""

    tier: Literal["light", "blocks"] = Field(
        "light", description="light: whole model; blocks: one decoder block at a time"
    )
    memory_limit_gib: float | None = Field(
        None, gt=0, description="above this estimate 'light' goes block by block; default: half of what is free"
    )


class ModelConfig(Section):
    """Which model to train."""

    path: str | None = Field(None, description="Hugging Face folder or hub id")
    from_scratch: FromScratch | None = None
    verification: VerificationConfig = VerificationConfig()

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("the model needs exactly one of 'path' and 'from_scratch'")
        return self
