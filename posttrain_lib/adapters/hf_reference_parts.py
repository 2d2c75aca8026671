"""Parts of transformers' models: one layer, or what stands around the layers; and where a stored tensor ends up.

transformers' own conversion puts the weights in their place, so that a part owes nothing to our reading of the files.
A layer is cut out of the whole model, which is built without memory: so it knows its number, its kind and its window,
whatever fields of the configuration decide them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.adapters.hf_reference import build_reference
from posttrain_lib.errors import ModelError

_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
# Of a model whose vocabulary is cut the special tokens may lie outside.
_NO_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def layer_kinds(reference: Any) -> list[str] | None:
    """``layer_types`` of transformers' model, None where its family has no such field."""
    kinds: list[str] | None = reference.config.to_dict().get("layer_types")
    return kinds


def stored_layer(tensor: str) -> int | None:
    """The layer that a stored tensor belongs to; None outside the layers."""
    found = _LAYER.search(tensor)
    return int(found.group(2)) if found else None


class ReferenceParts:
    """transformers' model of a config.json, to be had in parts; the whole is never held."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        self._hf_config = hf_config
        with torch.device("meta"):
            self._frame = build_reference(hf_config, dtype=torch.float32)
        self._layers = list(self._frame.model.layers)
        self._kinds = layer_kinds(self._frame)
        self._frame.model.layers, self._frame.model.norm = nn.ModuleList(), nn.Identity()
        self._frame.config.num_hidden_layers = 1
        rotary = getattr(self._frame.model, "rotary_emb", None)
        if rotary is not None:  # its tables are no weights: no file fills them
            self._frame.model.rotary_emb = type(rotary)(self._frame.config)

    @property
    def tied(self) -> bool:
        """Whether transformers takes the head from the embedding."""
        return bool(self._frame.config.tie_word_embeddings)

    def layer(self, number: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        """A model that has this layer alone, as its layer 0: ``model.model(inputs_embeds=...)`` runs it.

        Args:
            tensors: stored name -> value, of this layer.

        Raises:
            ModelError: transformers does not find all of the layer's weights among them.
        """
        model = copy.deepcopy(self._frame)
        model.model.layers.append(copy.deepcopy(self._layers[number]).to(dtype))
        if self._kinds is not None:
            model.config.layer_types = [self._kinds[number]]
        _fill(model, {layer_as(name, 0): value for name, value in tensors.items()}, dtype, "model.layers.0.")
        return model.eval()

    def ends(self, vocab_size: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        """A model without layers: embedding, final norm and head.

        Args:
            vocab_size: rows of embedding and head, which may be some of the real ones.
            tensors: stored name -> value.
        """
        changes = {**_NO_SPECIAL_TOKENS, "vocab_size": vocab_size, "num_hidden_layers": 0}
        if self._kinds is not None:
            changes["layer_types"] = []
        model = build_reference(self._hf_config, dtype=dtype, **changes)
        _fill(model, tensors, dtype, "")
        model.tie_weights()
        return model.eval()


def layer_as(tensor: str, number: int) -> str:
    """The stored tensor of the same name in another layer."""
    return _LAYER.sub(rf"\g<1>layers.{number}.", tensor, count=1)


def _fill(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, required: str) -> None:
    """transformers' own conversion from stored tensors to its parameters. ``required``: of the parameters' names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(dtype=dtype, weight_mapping=get_model_conversion_mapping(model))
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings, None)
    tied = set(model.all_tied_weights_keys)
    lost = sorted(name for name in info.missing_keys - tied if name.startswith(required))
    lost += sorted(map(str, info.mismatched_keys)) + sorted(map(str, info.conversion_errors))
    if lost:
        raise ModelError("transformers does not find all weights of a part of the model", got=", ".join(lost[:4]))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars off: the flow has one of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def parameters_of_stored(reference: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Stored name -> name of the parameter or buffer of ``reference`` that it goes into; those that go nowhere are
    left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(reference)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = reference.state_dict()
    found = {}
    for tensor in tensors:
        name, _ = rename_source_key(tensor, renamings, converters, reference.base_model_prefix, known)
        if name in known:
            found[tensor] = name
    return found


def stored_gradients(reference: Any) -> dict[str, Tensor]:
    """Stored name -> gradient, of every parameter of ``reference`` that has one, by transformers' own conversion."""
    from transformers.core_model_loading import revert_weight_conversion

    grads = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    return dict(revert_weight_conversion(reference, grads))
