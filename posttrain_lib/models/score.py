"""A decoder whose head gives one number: a reward model (Ouyang et al. 2022, section 3.5).

In files it is transformers' sequence classification of one label: the body under the names that it has in a causal
language model, and ``score.weight`` [1, D] in place of the head over the vocabulary. A document's score is the product
of that row and the hidden state of its last token.

transformers finds that token by its id: the last one that is not ``pad_token_id``, whatever the attention mask says. So
the padding token must be in config.json, and must be none that documents end with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.weights import same

if TYPE_CHECKING:
    from torch import nn

#: the head's row, by our name and by transformers'
SCORE = "score.weight"
_CLASSIFIER = "ForSequenceClassification"
# transformers writes the labels of one output so.
_ONE_LABEL: dict[str, Any] = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def is_score_config(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classification model."""
    named = hf_config.get("architectures")
    return isinstance(named, list | tuple) and bool(named) and str(named[0]).endswith(_CLASSIFIER)


def score_architecture(model_type: str, where: str = "config.json") -> str:
    """The name of transformers' sequence classification class of a ``model_type``.

    Raises:
        ModelError: it has none, so that a reward model of this type could not be loaded by anybody else.
    """
    from posttrain_lib.adapters.hf_reference_class import classifier_name, types_with_classifier
    from posttrain_lib.models.families import FAMILIES

    name = classifier_name(model_type)
    if name is None:
        raise ModelError(
            "transformers has no sequence classification class of this architecture, which a reward model is saved as",
            where=f"{where}: model_type",
            got=model_type,
            expected="one of " + ", ".join(sorted(types_with_classifier() & set(FAMILIES))),
            fix="make the reward model of another architecture",
        )
    return name


def check_score_config(hf_config: Mapping[str, Any], where: str) -> None:
    """ModelError unless a sequence classification config.json is one that a score head can be made of: of transformers'
    own class, with one label."""
    wanted = [score_architecture(str(hf_config.get("model_type")), where)]
    if list(hf_config["architectures"]) != wanted:
        raise ModelError(
            "the model is not the sequence classification model of its family",
            where=f"{where}: architectures",
            got=hf_config["architectures"],
            expected=wanted,
            fix="check that config.json belongs to these weights",
        )
    labels = hf_config.get("id2label")
    # transformers' own rule: the labels decide, and without any there are two.
    count = len(labels) if isinstance(labels, Mapping) else hf_config.get("num_labels", 2)
    if count != 1:
        raise ModelError(
            "a classifier of several labels is no reward model",
            where=f"{where}: id2label" if isinstance(labels, Mapping) else f"{where}: num_labels",
            got=f"{count} labels",
            expected="1",
            fix="use a model that was trained with num_labels=1",
        )


def as_score_model(spec: ModelSpec) -> ModelSpec:
    """The spec with a score head in place of the one over the vocabulary; its files are not looked at."""
    config = dataclasses.replace(
        spec.config, score_head=True, tie_word_embeddings=False, logit_scale=1.0, logit_softcap=None
    )
    return dataclasses.replace(
        spec,
        config=config,
        rules=(*spec.rules, same(SCORE, SCORE)),
        sharding_plan={**spec.sharding_plan, SCORE: "replicate"},
    )


def with_score_head(spec: ModelSpec, pad_token_id: int | None = None) -> ModelSpec:
    """The reward model that training makes of a causal language model: the same body, and a score head that its folder
    does not hold (:func:`init_score_head` makes it). A spec that has a score head comes back as it is.

    Args:
        spec: of the folder.
        pad_token_id: for config.json; None = the one that it has.

    Raises:
        ModelError: transformers has no class to save it as; no padding token, one outside the vocabulary, or one that
            ends documents: transformers would then read the score of another token than the last.
    """
    if spec.config.score_head:
        return spec
    architecture = score_architecture(spec.family)
    given = spec.hf_config.get("pad_token_id") if pad_token_id is None else pad_token_id
    labels = {**_ONE_LABEL, "pad_token_id": _checked_padding(given, spec)}
    head = next(rule.theirs for rule in spec.rules if rule.ours == ("lm_head.weight",))
    replaced = head.replace(".", r"\.") + "$"
    return dataclasses.replace(
        as_score_model(spec),
        left_alone=replaced if spec.left_alone is None else f"{spec.left_alone}|{replaced}",
        hf_config={**spec.hf_config, "architectures": [architecture], **labels},
        initialised=(SCORE,),
    )


def _checked_padding(given: Any, spec: ModelSpec) -> int:
    ends = spec.hf_config.get("eos_token_id")
    stops = ends if isinstance(ends, list | tuple) else [ends]
    if not isinstance(given, int) or not 0 <= given < spec.config.vocab_size or given in stops:
        raise ModelError(
            "a reward model needs a padding token of its own: transformers scores the last token that is not padding",
            where="config.json: pad_token_id",
            got=f"{given}, which also ends documents (eos_token_id)" if given in stops and given is not None else given,
            expected=f"an id below {spec.config.vocab_size} that no document ends with",
            fix="give the id of a token that is in no text, as the tokenizer's reserved ones are",
        )
    return given


def init_score_head(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill the score head that the folder of ``spec`` does not hold, in place, sharded or not; else do nothing.

    Normal with standard deviation ``initializer_range`` (0.02 by default), as transformers begins it, from a generator
    seeded by seed and name: no layout enters. Not zero: then the body would get no gradient in the first step, and for
    long one so small that Adam's epsilon hides it.
    """
    import torch

    from posttrain_lib.checkpoint.hf import local_block
    from posttrain_lib.models.seeds import named_generator

    if SCORE not in spec.initialised:
        return
    parameter = dict(model.named_parameters())[SCORE]
    deviation = float(spec.hf_config.get("initializer_range", 0.02))
    whole = torch.empty(parameter.shape).normal_(0.0, deviation, generator=named_generator(seed, SCORE))
    block, begin = local_block(parameter)
    with torch.no_grad():
        block.copy_(whole[tuple(slice(first, first + size) for first, size in zip(begin, block.shape, strict=True))])
