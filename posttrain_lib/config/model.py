"""The ``model`` section: a Hugging Face folder, or one made from scratch; and its verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain_lib.config.base import Section
from posttrain_lib.config.origin import ModelOrigin


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
    sharded: bool = Field(False, description="also compare two processes with one; takes some ten seconds")


class AddedToken(Section):
    """One new token."""

    token: str = Field(min_length=1)
    special: bool = Field(True, description="a control token: decoding leaves it out; false: it is text")
    description: str | None = Field(
        None, min_length=1, description="text whose tokens' mean its rows begin as; default: as model.vocabulary says"
    )


class TokenBlock(Section):
    """New tokens that differ in a number, as semantic ids do."""

    format: str = Field(description="their text, {n} standing for the number, counted from 0: <item_{n}>")
    count: int = Field(ge=1)
    special: bool = Field(False, description="control tokens: decoding leaves them out; false: they are text")
    description: str | None = Field(
        None, min_length=1, description="as of a single token; {n} in it stands for the number, too"
    )

    @field_validator("format")
    @classmethod
    def _has_a_number(cls, value: str) -> str:
        if "{n}" not in value:
            raise ValueError("a block's format needs {n}, which becomes the number, as <item_{n}>")
        return value

    def names(self) -> Iterator[str]:
        """The texts of the block's tokens in order."""
        return (self.format.replace("{n}", str(number)) for number in range(self.count))

    def tokens(self) -> Iterator[AddedToken]:
        """The block's tokens in order."""
        for number, name in enumerate(self.names()):
            text = self.description and self.description.replace("{n}", str(number))
            yield AddedToken(token=name, special=self.special, description=text)


class Vocabulary(Section):
    """The model's vocabulary: its size in memory, and tokens that it gains before anything else happens to it."""

    pad_to_multiple_of: int = Field(
        64, ge=1, description="rows of embedding and head in memory; never in files. 1: no padding"
    )
    add_tokens: tuple[AddedToken, ...] = Field((), description="new tokens; a plain string is a special token")
    add_blocks: tuple[TokenBlock, ...] = Field((), description="numbered tokens, behind the single ones")
    initialise: Literal["mean", "normal"] = Field(
        "mean", description="new rows: mean of the used ones with noise (Hewitt 2021), or as new weights of the model"
    )
    noise: float = Field(1e-5, ge=0, description="share of the rows' covariance that the noise on a mean has")
    seed: int = 0

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _plain_strings(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return [{"token": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _named_once(self) -> Vocabulary:
        names = Counter(token.token for token in self.add_tokens)
        for block in self.add_blocks:
            names.update(block.names())
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"add_tokens and add_blocks name tokens twice: {', '.join(twice[:4])}")
        return self

    def count(self) -> int:
        """How many are added; making the tokens themselves takes a while for a million of them."""
        return len(self.add_tokens) + sum(block.count for block in self.add_blocks)

    def new_tokens(self) -> list[AddedToken]:
        """All that are added, in the order of their ids."""
        return [*self.add_tokens, *(token for block in self.add_blocks for token in block.tokens())]


class Lora(Section):
    """Low-rank adapters on a frozen base. Groups of targets: attention, mlp, experts, head, embedding; or names of
    projections, as q_proj or layers.3.mlp.up_proj."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="the adapter's product is multiplied by alpha / rank")
    targets: tuple[str, ...] = Field(("attention", "mlp"), min_length=1)
    rslora: bool = Field(False, description="alpha / sqrt(rank) in place of alpha / rank")
    dora: bool = Field(False, description="train the lengths of rows by themselves; vLLM serves it merged only")
    seed: int = 0
    base_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights in memory")
    freeze_new_tokens: bool = Field(
        False, description="rows of tokens that model.vocabulary adds stay as they begin: nothing trains them"
    )

    @model_validator(mode="after")
    def _dora_has_projections(self) -> Lora:
        if self.dora and (without := sorted({"experts", "head", "embedding"} & set(self.targets))):
            raise ValueError(f"DoRA is for the projections of attention and mlp: take {without} out of targets")
        return self


class ModelConfig(Section):
    """Which model to train."""

    path: str | None = Field(
        None,
        description="Hugging Face folder, its URL in an object store (s3://...), hub id owner/name[@revision], a run's "
        "result (SFTFlow/<run id>, SFTFlow/latest, SFTFlow/tag:<tag>) or a promoted model (models/<name>[@<version>])",
    )
    origin: ModelOrigin | None = Field(None, description="written by the run: what made the model that path named")
    from_scratch: FromScratch | None = None
    verification: VerificationConfig = VerificationConfig()
    vocabulary: Vocabulary = Vocabulary()
    lora: Lora | None = Field(None, description="train low-rank adapters; default: train all weights")
    backend: Literal["native", "hf"] = Field(
        "native", description="hf: as transformers' own class, for architectures without a definition of ours"
    )

    @property
    def pad_vocabulary_to(self) -> int:
        """Rows of embedding and head come in multiples of it; transformers' own classes are left as they are."""
        return 1 if self.backend == "hf" else self.vocabulary.pad_to_multiple_of

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("the model needs exactly one of 'path' and 'from_scratch'")
        if self.origin is not None and self.origin.path != self.path:
            raise ValueError("origin tells of another model than path names: leave it out, the run writes it")
        return self

    @model_validator(mode="after")
    def _new_tokens_are_trained(self) -> ModelConfig:
        """Adapters elsewhere leave the rows of new tokens as they begin, and a token with such rows means nothing."""
        added = self.vocabulary.count()
        if self.lora is None or not added:
            return self
        # A tied model has one weight for both, and either name means it; which models are tied is not known here.
        pairs = (("embedding", "embed_tokens"), ("head", "lm_head"))
        lacking = [names[0] for names in pairs if not set(names) & set(self.lora.targets)]
        if lacking and not self.lora.freeze_new_tokens:
            dora = "dora: false and " if self.lora.dora else ""
            raise ValueError(
                f"lora would never train the rows of the {added} new tokens, for its targets lack "
                f"{' and '.join(lacking)}: set {dora}lora.targets: [{', '.join([*self.lora.targets, *lacking])}], or "
                "lora.freeze_new_tokens: true to leave them as they begin"
            )
        if self.lora.freeze_new_tokens and len(lacking) < len(pairs):
            raise ValueError(
                "lora.freeze_new_tokens: true contradicts lora.targets, which train embedding or head and with it the "
                "new tokens' rows: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _backend_can(self) -> ModelConfig:
        if self.backend == "native":
            return self
        lacking = {
            "lora": self.lora is not None,
            "vocabulary.add_tokens": bool(self.vocabulary.add_tokens),
            "vocabulary.add_blocks": bool(self.vocabulary.add_blocks),
            "verification.tier: blocks": self.verification.tier == "blocks",
            "verification.sharded": self.verification.sharded,
            "path in an object store": self.path is not None and "://" in self.path,
        }
        if asked := [name for name, wanted in lacking.items() if wanted]:
            raise ValueError(
                f"backend hf runs transformers' own class, which has no {', '.join(asked)}: leave that out, or use "
                "an architecture that has a definition here"
            )
        return self
