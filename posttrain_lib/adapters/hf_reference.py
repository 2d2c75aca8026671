"""transformers' own models: the reference that ours are compared with. Nothing else in the project builds them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.errors import ModelError
from posttrain_lib.models.score import is_score_config

# Every implementation computes the same thing; eager is the definition, without fused kernels.
_IMPLEMENTATION = {"attn_implementation": "eager", "experts_implementation": "eager"}


#: what model code reads and the configuration classes of some families do not list
_UNLISTED = {"head_dim", "rope_theta", "rope_scaling"}


def architecture_config(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a new model: transformers' configuration class of ``model_type`` with these fields.

    Raises:
        ModelError: a field that the class does not have (with the nearest that it has), or a value that it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    template = AutoConfig.for_model(model_type)
    known = set(type(template).__dataclass_fields__) | set(template.to_dict()) | _UNLISTED
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise ModelError(
                "the architecture has no such field",
                where=f"model.from_scratch.architecture.{name}",
                got=name,
                expected=f"a field of transformers' {type(template).__name__}",
                fix=f"did you mean {near[0]!r}?" if near else "remove it",
            )
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ModelError(
            "transformers refuses this architecture", where="model.from_scratch.architecture", got=error
        ) from error
    content = config.to_diff_dict()
    content.setdefault("tie_word_embeddings", config.tie_word_embeddings)
    return content


def build_reference(hf_config: Mapping[str, Any], *, dtype: torch.dtype, **changes: Any) -> Any:
    """transformers' model of a config.json on the CPU, in eval mode, with weights of no meaning: a causal LM, or a
    classifier that scores every token (see :func:`load_reference`).

    ``changes`` overwrite configuration fields.
    """
    config = _reference_config(hf_config, **changes)
    config.dtype = dtype  # a classifier makes its body by the configuration's own
    return _scoring(_automatic(config).from_config(config, dtype=dtype, **_IMPLEMENTATION)).eval()


def load_reference(folder: str | Path, *, dtype: torch.dtype, hf_config: Mapping[str, Any] | None = None) -> Any:
    """transformers' causal LM loaded by transformers' own loader, in eval mode on the CPU.

    Of a folder whose ``architectures`` is a sequence classification class, that class. Its ``logits`` are [B, S, 1], of
    every token, so that it is compared as a causal LM is; ``pooled`` is the class's own forward, of the last ones.

    ``hf_config`` replaces the folder's config.json where given. Weights that lie in a store are read into memory for
    it, whole, by their names: what they become is transformers' own doing all the same.

    Raises:
        ModelError: transformers refuses the folder, or loads it only in part (it would fill the rest at random).
    """
    from transformers.utils import logging

    from posttrain_lib.checkpoint.hf_files import StoredTensors
    from posttrain_lib.checkpoint.weight_files import POINTER

    config = _folder_config(folder) if hf_config is None else _reference_config(hf_config)
    loader = _automatic(config)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if (Path(folder) / POINTER).is_file():
        stored = StoredTensors(folder)
        tensors = {name: stored.read(name) for name in stored.entries}
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        with torch.device("meta"):  # without a name the automatic class cannot tell which one it stands for
            loader = type(loader.from_config(config))
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the flow has a progress bar of its own
    try:
        model, info = loader.from_pretrained(
            config=config, dtype=dtype, output_loading_info=True, **source, **_IMPLEMENTATION
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError("transformers cannot load the model folder", where=folder, got=error) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    lost = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if lost:
        raise ModelError("transformers does not find all weights in the folder", where=folder, got=", ".join(lost[:4]))
    if is_score_config(config.to_dict()) and (unplaced := sorted(map(str, info["unexpected_keys"]))):
        raise ModelError(
            "the folder holds weights that transformers' classifier has no place for",
            where=folder,
            got=", ".join(unplaced[:4]),
        )
    return _scoring(model).eval()


def _automatic(config: Any) -> Any:
    """transformers' automatic class for the kind of model that a configuration names."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if is_score_config(config.to_dict()) else AutoModelForCausalLM


class _EveryToken:
    """In front of a sequence classification class: ``forward`` scores every token, ``pooled`` is the class's own."""

    def forward(self: Any, **inputs: Any) -> Any:
        """[B, S, 1] as ``logits``."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.score(self.model(**inputs).last_hidden_state))

    def pooled(self: Any, **inputs: Any) -> Tensor:
        """[B], one score a document."""
        scores: Tensor = super().forward(**inputs).logits[:, 0]  # type: ignore[misc]
        return scores


def _scoring(model: Any) -> Any:
    """A causal LM as it is; a classifier becomes one that has :class:`_EveryToken` in front, with the name it had."""
    kind = type(model)
    if is_score_config({"architectures": [kind.__name__]}):
        model.__class__ = type(kind.__name__, (_EveryToken, kind), {})
    return model


def _reference_config(hf_config: Mapping[str, Any], **changes: Any) -> Any:
    from transformers import AutoConfig

    content = {**hf_config, **changes}
    return AutoConfig.for_model(content.pop("model_type"), **content)


def _folder_config(folder: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError("transformers cannot load the model folder", where=folder, got=error) from error


def reference_logits(model: Any, token_ids: Tensor) -> Tensor:
    """[S, V] logits of one document int64 [S], no cache, no gradient."""
    with torch.no_grad():
        return model(input_ids=token_ids[None], use_cache=False).logits[0]


def tokenizer_facts(folder: str | Path) -> dict[str, Any]:
    """{"length", "bos_token_id", "eos_token_id", "pad_token_id"} of a tokenizer folder, by AutoTokenizer.

    Raises:
        ModelError: AutoTokenizer cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "the tokenizer folder cannot be loaded", where=folder, got=error, fix="name a Hugging Face tokenizer folder"
        ) from error
    return {
        "length": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
