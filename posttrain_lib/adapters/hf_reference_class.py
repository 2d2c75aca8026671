"""transformers' own class and configuration object of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.families.foreign import refuse_own_code


def native_class(hf_config: Mapping[str, Any], where: str) -> Any:
    """transformers' own causal language model of a ``model_type``; code in a model folder is not run.

    Raises:
        ModelError: it has none.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = hf_config.get("model_type")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if names is None:
        refuse_own_code(hf_config, where)
        raise ModelError(
            "transformers has no causal language model of this type",
            where=f"{where}: model_type",
            got=model_type,
            expected=f"a model_type that transformers {transformers.__version__} has one for",
            fix="use another model, or a transformers that has it",
        )
    return getattr(transformers, names if isinstance(names, str) else names[0])


def classifier_name(model_type: str) -> str | None:
    """The name of transformers' own sequence classification class of a ``model_type``; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    return names if names is None or isinstance(names, str) else str(names[0])


def types_with_classifier() -> set[str]:
    """Every ``model_type`` that transformers has a sequence classification class of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def native_config(hf_config: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration object of a config.json's content.

    Raises:
        ModelError: transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    content = dict(hf_config)
    try:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ModelError("transformers refuses this configuration", where=where, got=error) from error
