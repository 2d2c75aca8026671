"""What a run is refused for before its first step: data and model that do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from posttrain_lib.data.token_store import KINDS, TokenStore
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.evaluation.perplexity import ALL

if TYPE_CHECKING:
    from posttrain_lib.config.train import TrainConfig
    from posttrain_lib.data.loader import LoadedStep
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.hf_spec import HFSpec
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.schema.batches import PackedBatch


def check_vocabulary(spec: ModelSpec | HFSpec, *stores: TokenStore) -> None:
    """Refuse data whose ids the model's embedding does not have: on a GPU the look-up would fail without a name.

    Raises:
        DataError: naming the store, its largest id and the model's vocabulary.
    """
    for store in stores:
        if store.largest_id >= spec.config.vocab_size:
            raise DataError(
                "the data has token ids that the model does not know",
                where=store.folder,
                got=f"largest id {store.largest_id}",
                expected=f"ids below {spec.config.vocab_size}, the model's vocab_size",
                fix="prepare the data with the model's own tokenizer (leave data.tokenizer out)",
            )


def check_ids(spec: ModelSpec | HFSpec, loaded: LoadedStep) -> None:
    """The same of a step's own tokens, for rows that no store has counted: padding rows would train as tokens.

    Raises:
        DataError: naming the step and its largest id.
    """
    largest = max(int(batch.token_ids.max(initial=-1)) for batch in loaded.micro_batches)
    if largest >= spec.config.vocab_size:
        raise DataError(
            "the data has token ids that the model does not know",
            where=f"step {loaded.step}",
            got=f"largest id {largest}",
            expected=f"ids below {spec.config.vocab_size}, the model's vocab_size",
            fix="tokenise with the model's own tokenizer (leave data.tokenizer out)",
        )


def check_kind(store: TokenStore, loss: Loss) -> None:
    """Refuse examples that the loss is not made for: SFT on pairs would learn the rejected answers, too.

    Raises:
        DataError: naming the kinds.
    """
    wanted = loss.kind
    found = {KINDS[kind] for kind in np.unique(store.kinds).tolist()}
    if found - {wanted}:
        raise DataError(
            "the data is not of the kind that the loss learns from",
            where=store.folder,
            got=", ".join(sorted(found)),
            expected=wanted,
            fix="choose the recipe for such rows, or another data.sources.format",
        )


def check_margins(store: TokenStore, loss: Loss) -> None:
    """Refuse pairs without any margin for a loss that wants them: it would train as if it had not been asked to.

    Raises:
        DataError: naming the store.
    """
    if loss.wants_margins and store.margins is None:
        raise DataError(
            "the loss reads the pairs' margins, and no pair has one",
            where=store.folder,
            got=f"{len(store) // 2} pairs without a margin",
            expected="a number 'margin' in the rows, at least in some",
            fix="name the rows' field in data.sources.fields (margin: <field>), or leave reward.margin_weight out",
        )


def check_sources(*stores: TokenStore) -> None:
    """Refuse a source with the name that losses over all sources have: it would stand in their place.

    Raises:
        ConfigError: naming the source.
    """
    for store in stores:
        if ALL in store.sources:
            raise ConfigError(
                "a source has the name of the mean over all sources",
                where="data.sources.name",
                got=ALL,
                expected="another name",
                fix="rename the source and prepare the data again",
            )


def check_divisor(loss: Loss, divisor: float, micro_batches: Sequence[PackedBatch]) -> None:
    """Refuse a loss that counts nothing in a step that has tokens to learn from: its gradients would be thrown away.

    Raises:
        ConfigError: naming the loss.
    """
    trained = sum(len(batch.supervised_index) for batch in micro_batches)
    if trained and not divisor > 0:
        raise ConfigError(
            f"the loss {type(loss).__module__}:{type(loss).__qualname__} has a divisor of {divisor} for a step with "
            "trained tokens",
            where="train.loss",
            got=f"{trained} trained tokens on this rank",
            expected="a number above 0, as batch.weight",
            fix="posttrain_lib.losses.contract.check_loss() finds such faults before a run",
        )


def check_warmup(config: TrainConfig, total_steps: int) -> None:
    """The config checks this where it states steps; with epochs the number is known only here."""
    if config.schedule.warmup_steps > total_steps:
        raise ConfigError(
            "the warm-up is longer than the training",
            where="train.schedule.warmup_steps",
            got=config.schedule.warmup_steps,
            expected=f"at most {total_steps}, the steps until the data ends",
        )
