"""What several steps load: the run's tokenizer, the model before training, the held-out prompts.

Apart from the step ``evaluate``, so that a change of an evaluation task is no change of the steps that load these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef
from steps import beside
from steps.base import StepContext

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


def load_base(context: StepContext) -> Decoder:
    """The model that was trained, as it was before."""
    from posttrain_lib.evaluation.model import load_model

    wanted = context.config.model
    folder = context.inputs["model"].uri
    padding = None
    if context.config.reward is not None:
        padding = beside.score_padding(context.config, load_tokenizer(context.config, context.inputs))
    return load_model(
        folder,
        pad_vocabulary_to=wanted.pad_vocabulary_to,
        backend=wanted.backend,
        score_padding=padding,
        seed=context.config.train.seed,
    )


def load_tokenizer(config: RunConfig, found: dict[str, ArtifactRef]) -> ChatTokenizer:
    """The run's tokenizer with the run's template and date."""
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(
        found["tokenizer"].uri,
        chat_template=found["chat_template"].uri if "chat_template" in found else None,
        template_date=config.data.template_date,
        template_kwargs=config.data.template_kwargs,
    )


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The held-out prompts that the data step wrote, in their order."""
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]
