"""Architectures by Hugging Face ``model_type``. One file each: config mapping, weight map, sharding plan."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.foreign import refuse_own_code, refuse_quantised
from posttrain_lib.models.families.shared import sharding_plan
from posttrain_lib.models.score import as_score_model, check_score_config, is_score_config
from posttrain_lib.models.spec import DecoderConfig, ModelSpec, Sharding
from posttrain_lib.models.weights import Rule

FAMILIES: dict[str, str] = {
    "deepseek_v3": "posttrain_lib.models.families.deepseek_v3:FAMILY",
    "gemma2": "posttrain_lib.models.families.gemma2:FAMILY",
    "gemma3_text": "posttrain_lib.models.families.gemma3:FAMILY",
    "glm4": "posttrain_lib.models.families.glm4:FAMILY",
    "gpt_oss": "posttrain_lib.models.families.gpt_oss:FAMILY",
    "granite": "posttrain_lib.models.families.granite:FAMILY",
    "llama": "posttrain_lib.models.families.llama:FAMILY",
    "mistral": "posttrain_lib.models.families.mistral:FAMILY",
    "mixtral": "posttrain_lib.models.families.mixtral:FAMILY",
    "olmo2": "posttrain_lib.models.families.olmo2:FAMILY",
    "olmo3": "posttrain_lib.models.families.olmo3:FAMILY",
    "olmoe": "posttrain_lib.models.families.olmoe:FAMILY",
    "phi3": "posttrain_lib.models.families.phi3:FAMILY",
    "qwen2": "posttrain_lib.models.families.qwen2:FAMILY",
    "qwen3": "posttrain_lib.models.families.qwen3:FAMILY",
    "qwen3_moe": "posttrain_lib.models.families.qwen3_moe:FAMILY",
    "qwen3_next": "posttrain_lib.models.families.qwen3_next:FAMILY",
    "smollm3": "posttrain_lib.models.families.smollm3:FAMILY",
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``architecture`` is the causal-LM class name that config.json carries; ``read_config`` turns config.json into a
    DecoderConfig or raises ModelError naming the field that it does not support. ``rules`` pair our parameters with
    stored tensors; ``left_alone`` matches the names of those that the decoder has no use for, ``{layers}`` standing for
    the number of layers. ``sharding_plan`` is the usual one of these parameters unless given.
    """

    model_type: str
    architecture: str
    read_config: Callable[[ConfigReader], DecoderConfig]
    rules: tuple[Rule, ...]
    sharding_plan: Mapping[str, Sharding] | None = None
    left_alone: str | None = None


def get_family(model_type: object, where: str = "model_type") -> Family:
    """The family of a ``model_type``; ModelError names the supported ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            "the architecture is not supported",
            where=where,
            got=model_type,
            expected="one of " + ", ".join(sorted(FAMILIES)),
            fix="use a model of a supported architecture; or, where transformers has a class of it, train it through "
            "that with model.backend: hf, or let flows/convert_flow.py look for a definition of it",
        )
    module, _, attribute = FAMILIES[model_type].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return family


def spec_from_config(hf_config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config.json's content: of a causal language model, or of a sequence classification model with
    one label (see ``models.score``).

    Raises:
        ModelError: another kind of model, or a field that is not supported, by its name.
    """
    refuse_quantised(hf_config, where)
    if str(hf_config.get("model_type")) not in FAMILIES:
        refuse_own_code(hf_config, where)
    family = get_family(hf_config.get("model_type"), where=f"{where}: model_type")
    architectures = hf_config.get("architectures")
    scores = is_score_config(hf_config)
    if scores:
        check_score_config(hf_config, where)
    elif architectures not in (None, [family.architecture], (family.architecture,)):
        raise ModelError(
            "the model is not a plain causal language model of its family",
            where=f"{where}: architectures",
            got=architectures,
            expected=[family.architecture],
            fix="export the causal language model part of it as a folder of its own",
        )
    try:
        fields = ConfigReader(hf_config)
        config = family.read_config(fields)
        fields.finish()
    except ModelError as error:
        raise ModelError(
            error.what, where=f"{where}: {error.where}", got=error.got, expected=error.expected, fix=error.fix
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            "config.json has a value that its architecture cannot be made of",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="values of the kinds that transformers writes",
            fix="compare the file with the maker's",
        ) from error
    spec = ModelSpec(
        family=family.model_type,
        config=config,
        rules=family.rules,
        sharding_plan=sharding_plan(family.rules) if family.sharding_plan is None else family.sharding_plan,
        left_alone=family.left_alone and family.left_alone.replace("{layers}", str(config.num_hidden_layers)),
        hf_config=dict(hf_config),
    )
    return as_score_model(spec) if scores else spec


def spec_from_folder(folder: str | Path) -> ModelSpec:
    """The ModelSpec of a Hugging Face folder. ModelError where config.json is missing, broken or unsupported."""
    return spec_from_config(read_hf_config(folder), where=str(Path(folder) / "config.json"))


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's config.json. ModelError where it is missing or broken."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        there = Path(folder).exists()
        raise ModelError(
            "the model is a file, not a folder" if there else "the model folder does not exist",
            where=folder,
            fix="name a folder in Hugging Face format",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            "the model folder has no config.json",
            where=path,
            got=", ".join(sorted(found.name for found in Path(folder).iterdir())[:8]) or "an empty folder",
            fix="name a folder in Hugging Face format",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError("config.json cannot be read", where=path, got=error, fix="fetch the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(
            "config.json does not hold an object", where=path, got=type(content).__name__, fix="fetch the folder again"
        )
    return content
