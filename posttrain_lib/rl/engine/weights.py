"""Weights between a decoder and the names, shapes and regions of a saved Hugging Face folder, without a folder.

Both directions go by the pieces that load and save folders (``models.weights``): one map, so that what the trainer
sends is what any engine that reads such a folder expects. Rows that pad the vocabulary are never sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import to_stored
from posttrain_lib.errors import RolloutError
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.lora import LoraDecoder, merged_state_dict, whole
from posttrain_lib.models.spec import VOCABULARY_WEIGHTS, ModelSpec
from posttrain_lib.models.weights import Piece, Shape

#: names that an error shows
_SHOWN = 4


def hf_weights(model: Decoder, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight, in the order of the spec's rules.

    A tensor is a view of the parameter, in its dtype and on its device, where one region of one parameter is all of it;
    else a copy on the host. Read each before the next. Sharded parameters are gathered one after the other: every rank
    iterates. Adapters are merged into their weights, as an export does.
    """
    adapted = isinstance(model, LoraDecoder)
    parameters = merged_state_dict(model) if adapted else dict(model.named_parameters())
    held: dict[str, Tensor] = {}
    for theirs, (shape, pieces) in spec.stored.items():
        # Experts of one parameter are many tensors: it is gathered once for all.
        held = {name: held[name] if name in held else whole(parameters[name].detach()) for name in _ours(pieces)}
        yield theirs, _stored(pieces, held, shape)


def take_weights(model: Decoder, spec: ModelSpec, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors into the parameters, in place, in their dtype and on their device.

    Raises:
        RolloutError: as :func:`checked`. Weights that came before it are written: the model is then a mixture.
    """
    parameters, shapes = dict(model.named_parameters()), {name: shape for name, (shape, _) in spec.stored.items()}
    with torch.no_grad():
        for name, value in checked(weights, shapes):
            pieces = spec.stored[name][1]
            if _is_one(pieces, parameters, shapes[name]):
                parameters[pieces[0].ours].copy_(value)
                continue
            for piece in pieces:
                part = value[piece.their_index]
                parameters[piece.ours][piece.our_index].copy_(part.mT if piece.transposed else part)
        for name in VOCABULARY_WEIGHTS:
            if name in parameters:
                parameters[name][spec.config.vocab_size :] = 0


def checked(weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """The same weights, as long as they are those of ``shapes``: each name once, in its shape, none left out.

    Raises:
        RolloutError: naming the weight.
    """
    missing = dict.fromkeys(shapes)
    for name, value in weights:
        if name not in missing:
            raise RolloutError(
                "the engine was given a weight twice" if name in shapes else "the engine has no such weight",
                where=name,
                got=list(value.shape),
                fix="push exactly the tensors that a saved folder of this model holds",
            )
        if tuple(value.shape) != shapes[name]:
            raise RolloutError(
                "a weight has another shape than the engine's",
                where=name,
                got=list(value.shape),
                expected=list(shapes[name]),
                fix="push the weights of the model that the engine was made for, without padded rows",
            )
        del missing[name]
        yield name, value
    if missing:
        raise RolloutError(
            "the engine was not given all of its weights",
            where=", ".join(list(missing)[:_SHOWN]),
            got=f"{len(shapes) - len(missing)} of {len(shapes)} tensors",
            fix="push every weight of the model, changed or not",
        )


def _is_one(pieces: Sequence[Piece], parameters: Mapping[str, Tensor], shape: Shape) -> bool:
    """Whether the stored tensor is a whole parameter as it lies there: of most it is said without indexing."""
    return len(pieces) == 1 and not pieces[0].transposed and parameters[pieces[0].ours].shape == shape


def _stored(pieces: Sequence[Piece], parameters: dict[str, Tensor], shape: Shape) -> Tensor:
    """A stored tensor: a view if it is one region of a parameter."""
    first = parameters[pieces[0].ours]
    if _is_one(pieces, parameters, shape):
        return first
    part = first[pieces[0].our_index]
    if pieces[0].transposed:
        part = part.mT
    return part if len(pieces) == 1 and part.shape == shape else to_stored(pieces, parameters, shape, first.dtype)


def _ours(pieces: Sequence[Piece]) -> list[str]:
    return list(dict.fromkeys(piece.ours for piece in pieces))
