"""What recipes beyond SFT add to training and evaluation: a frozen model, and the padding token of a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.companion import Companion
from posttrain_lib.schema.manifests import ArtifactRef
from steps import score_data
from steps.base import Manifests, StepContext

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The frozen model, and what it said of the data where that is stored."""
    found = {}
    if score_data.is_needed(config):
        scored = manifests["score_data"].outputs
        found = {f"signals:{split}": scored[split] for split in score_data.SPLITS}
    if config.companion is not None:
        found["companion"] = score_data.companion_of(config, manifests)
    return found


def companion(context: StepContext, *, in_one_process: bool = False) -> Companion | None:
    """The frozen model as a job is told of it; None where the recipe has none.

    ``in_one_process``: adapters are merged there, so that the base is a model by itself.
    """
    if context.config.companion is None:
        return None
    kept = context.config.companion.kept
    found = context.inputs["companion"]
    if kept == "base" and not in_one_process:
        return Companion("base")
    if kept in ("live", "base"):
        return Companion("live", folder=found.uri)
    tables = {split: context.inputs[f"signals:{split}"].uri for split in score_data.SPLITS}
    return Companion("stored", tables=tables, made_of={"model": found.digest})


def score_padding(config: RunConfig, tokenizer: ChatTokenizer) -> int | None:
    """The padding token's id of a reward model's config.json; None for other recipes.

    Raises:
        ConfigError: the token named is not in the vocabulary, or the tokenizer has none of its own.
    """
    if config.reward is None:
        return None
    named = config.reward.pad_token
    found = tokenizer.pad_id if named is None else tokenizer.id_of(named)
    if found is None:
        raise ConfigError(
            "a reward model needs a padding token, by which transformers finds the end of a text",
            where="reward.pad_token",
            got="none in the tokenizer" if named is None else f"{named!r}, which is not in the vocabulary",
            expected="a token that ends no document",
            fix="name one, as a reserved token of the tokenizer",
        )
    return found
