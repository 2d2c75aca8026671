"""The parts of a model as subjects: what stands around the blocks, then one block after the other.

For models whose whole reference does not fit into memory. A wrong order of blocks cannot hide: the reference's output
of a block is what the next one is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.adapters.hf_reference_parts import ReferenceParts, stored_layer
from posttrain_lib.checkpoint.hf import DTYPES, fill_from, is_left_alone, pieces_by_parameter, stored_name
from posttrain_lib.checkpoint.hf_files import Region, StoredTensors
from posttrain_lib.checkpoint.verify_comparison import Comparison
from posttrain_lib.checkpoint.verify_documents import Documents
from posttrain_lib.checkpoint.verify_subject import Subject, kinds_of, one_layer_spec
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.spec import ModelSpec, layer_parameter_shapes

Build = Callable[[ModelSpec, Callable[[str], Tensor | None]], Decoder]

# Per parameter of a block: it is held in the file's dtype; the reference in float32, float64 and bfloat16; ours in
# float32 and bfloat16; and a float64 copy of ours with two sets of gradients. Measured: 58.
_BYTES_PER_PARAMETER = 64
_BYTES_PER_ROW_ENTRY = 12  # of the vocabulary's matrices, one at a time: as it is stored, as ours, and as stored again


def block_bytes(spec: ModelSpec) -> int:
    """Memory that the comparison of the largest block takes, in bytes; the mapped files are not counted."""
    sizes = (
        sum(torch.Size(shape).numel() for shape in layer_parameter_shapes(spec.config, layer).values())
        for layer in kinds_of(spec.config.layers)
    )
    vocabulary = spec.config.vocab_size * spec.config.hidden_size
    return max(_BYTES_PER_PARAMETER * max(sizes), _BYTES_PER_ROW_ENTRY * vocabulary)


class FolderWeights:
    """A folder's tensors under our names and under their own."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.files, self._spec = StoredTensors(folder), spec
        self._pieces, self._shapes = pieces_by_parameter(spec), spec.parameter_shapes()

    def __call__(self, name: str) -> Tensor | None:
        """One of our parameters in the file's dtype; None where the files have no such one."""
        pieces = self._pieces.get(name)
        if pieces is None:
            return None
        value = torch.empty(self._shapes[name], dtype=DTYPES[self.files.entries[pieces[0].theirs].dtype])
        fill_from(self.files, pieces, value)
        return value

    def stored(self, layer: int | None) -> dict[str, Tensor]:
        """Stored name -> tensor, of a layer or of what stands around the layers; the vocabulary's are left out."""
        vocabulary = {stored_name(self._spec, f"{name}.weight") for name in ("embed_tokens", "lm_head")}
        return {
            name: self.files.read(name)
            for name in self.files.entries
            if stored_layer(name) == layer and name not in vocabulary and not is_left_alone(name, self._spec)
        }

    def rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Stored name -> rows [len(ids), D], of embedding and stored head."""
        names = (stored_name(self._spec, f"{name}.weight") for name in ("embed_tokens", "lm_head"))
        found = {}
        for name in names:
            if name in self.files.entries:
                size = self.files.entries[name].shape[1]
                rows = found[name] = torch.empty(len(ids), size, dtype=self.files.dtype(name))
                places = enumerate(ids.tolist())
                self.files.copy(
                    Region(name, (slice(row, row + 1), slice(0, size)), rows[place : place + 1])
                    for place, row in places
                )
        return found


def build_part(spec: ModelSpec, stored: Callable[[str], Tensor | None]) -> Decoder:
    """Ours in float32, of a part's spec, with the part's weights; NaN where there are none."""
    model = build_model(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = stored(name)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
    return model


def parts_of(
    spec: ModelSpec, folder: Path, documents: Documents, seed: int, build: Build = build_part
) -> Iterator[Comparison]:
    """The comparisons of a folder, part by part. ``build`` makes ours, apart so that a test can make a wrong one."""
    weights, parts = FolderWeights(spec, folder), ReferenceParts(spec.hf_config)
    ends = Comparison(_ends(spec, weights, parts, documents, build), seed)
    yield ends
    hidden = _embedded(ends)
    ends.release()
    kinds = kinds_of(spec.config.layers)
    for layer in range(spec.config.num_hidden_layers):
        own = one_layer_spec(spec, layer)

        def stored(name: str, layer: int = layer) -> Tensor | None:
            inside = name.startswith("layers.0.")
            return weights(name.replace("layers.0.", f"layers.{layer}.", 1)) if inside else None

        block = Comparison(
            Subject(
                spec=own,
                model=build(own, stored),
                inputs=hidden,
                lengths=documents.lengths,
                reference=partial(parts.layer, layer, weights.stored(layer)),
                stored=stored,
                kinds=(0,) if layer in kinds else (),
                layer=layer,
            ),
            seed,
        )
        yield block
        hidden = block.coarse.output
        block.release()


def _ends(
    spec: ModelSpec, weights: FolderWeights, parts: ReferenceParts, documents: Documents, build: Build
) -> Subject:
    """Embedding, final norm and head as a model without layers, of the rows of the vocabulary that the documents use:
    a row of either matrix does not know of the others."""
    ids, renumbered = documents.token_ids.unique(return_inverse=True)
    rows, rest = weights.rows(ids), weights.stored(None)
    own = dataclasses.replace(spec, config=dataclasses.replace(spec.config, layers=(), vocab_size=len(ids)))

    def stored(name: str) -> Tensor | None:
        if name in ("embed_tokens.weight", "lm_head.weight"):
            return rows.get(stored_name(spec, name))
        return weights(name)

    def reference(dtype: torch.dtype) -> Any:
        return parts.ends(len(ids), {**rest, **rows}, dtype)

    return Subject(own, build(own, stored), renumbered, documents.lengths, reference, stored, kinds=())


def _embedded(ends: Comparison) -> Tensor:
    """[T, D] what transformers makes of the tokens: what goes into its first layer."""
    given: list[Tensor] = []
    handle = ends.coarse_reference.model.norm.register_forward_pre_hook(lambda _module, args: given.append(args[0][0]))
    try:
        ends.theirs(ends.coarse_reference)
    finally:
        handle.remove()
    return torch.cat(given)
