"""What is compared: the whole model or a part of it, ours and transformers', with one way to run both.

The whole model goes from token ids to logits; a block from hidden states to hidden states, in a decoder that has no
other; what stands around the blocks is a whole model without any. The checks do not know which of these they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.checkpoint.verify_documents import places
from posttrain_lib.models.attention import RopeTables
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.feed_forward import Experts
from posttrain_lib.models.spec import LayerConfig, ModelSpec, layer_number
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.cache import KeyValueCache


@dataclass
class Subject:
    """A model, ours and transformers', and what goes in.

    ``layer``: the number in the model of a block, None for a whole model. ``spec`` is of what should be: ``model`` may
    have been made wrong. ``inputs``: int64 [T] token ids, or [T, D] hidden states of a block. ``kinds``: the layers of
    ``model`` that stand for all of their kind. ``stored`` gives the file's value of one of our parameters by its name
    in ``spec``, None where the files have none.
    """

    spec: ModelSpec
    model: Decoder
    inputs: Tensor
    lengths: tuple[int, ...]
    reference: Callable[[torch.dtype], Any]
    stored: Callable[[str], Tensor | None]
    kinds: tuple[int, ...]
    layer: int | None = None

    @property
    def what(self) -> str:
        """What comes out, in words."""
        return "logits" if self.layer is None else "hidden states"

    def named(self, module: str) -> str:
        """The name in the whole model of a module of ours."""
        return module if self.layer is None else module.replace("layers.0", f"layers.{self.layer}", 1)

    def run(
        self,
        model: Decoder,
        inputs: Tensor,
        lengths: tuple[int, ...],
        *,
        stride: int = 1,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[T, X] of ours: documents packed; with a cache, behind the tokens that it keeps."""
        positions, cu_seqlens = places(lengths, stride)
        if cache is not None:
            positions = torch.cat(
                [torch.arange(kept, kept + new) for kept, new in zip(cache.lengths.tolist(), lengths, strict=True)]
            )
        if self.layer is None:
            return model(inputs, positions, cu_seqlens, max(lengths), cache=cache)
        hidden = inputs.to(next(model.layers.parameters()).dtype)
        layout = DocumentLayout.of(cu_seqlens, max(lengths), cache=cache)
        return model.layers[0](hidden, model.rope_tables(positions, cu_seqlens), layout)

    def run_reference(self, reference: Any, *, stride: int = 1, documents: int | None = None) -> Tensor:
        """[T, X] of transformers': document by document, the first ``documents`` of them."""
        parts = self.inputs.split(self.lengths)[:documents]
        return torch.cat([self._run_reference(reference, part, stride) for part in parts])

    def _run_reference(self, reference: Any, part: Tensor, stride: int) -> Tensor:
        given: dict[str, Any] = {"position_ids": torch.arange(len(part))[None] * stride, "use_cache": False}
        if stride != 1:  # else transformers takes positions with gaps for documents in a row
            given["attention_mask"] = torch.ones(1, len(part), dtype=torch.int64)
        if self.layer is None:
            return reference(input_ids=part[None], **given).logits[0]
        hidden = part.to(next(reference.model.layers.parameters()).dtype)[None]
        outputs: list[Tensor] = []
        # The layer's own input is replaced, too: families scale what they are given as embedded.
        layer = reference.model.layers[0]
        handles = [
            layer.register_forward_pre_hook(
                lambda _m, args, kwargs: _with_hidden(hidden, args, kwargs), with_kwargs=True
            ),
            layer.register_forward_hook(
                lambda _m, _args, result: outputs.append(result[0] if isinstance(result, tuple) else result)
            ),
        ]
        try:
            reference.model(inputs_embeds=hidden, **given)
        finally:
            for handle in handles:
                handle.remove()
        return outputs[0][0]


def _with_hidden(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def experts_of(model: Decoder) -> list[tuple[int, nn.Module]]:
    """(layer, its experts) of ours."""
    found = ((layer_number(name), module) for name, module in model.named_modules() if isinstance(module, Experts))
    return [(layer, module) for layer, module in found if layer is not None]


def run_layer(layer: nn.Module, tables: RopeTables, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T, D] through a block of ours by itself."""
    _, cu_seqlens = places(lengths)
    return layer(hidden_TD, tables, DocumentLayout.of(cu_seqlens, max(lengths)))


def kinds_of(layers: tuple[LayerConfig, ...]) -> tuple[int, ...]:
    """The first layer of each kind."""
    first: dict[LayerConfig, int] = {}
    for number, layer in enumerate(layers):
        first.setdefault(layer, number)
    return tuple(first.values())


def one_layer_spec(spec: ModelSpec, layer: int) -> ModelSpec:
    """The spec of a decoder that has only this layer, and no vocabulary to speak of."""
    config = dataclasses.replace(
        spec.config, layers=(spec.config.layers[layer],), vocab_size=1, tie_word_embeddings=True
    )
    return dataclasses.replace(spec, config=config)
