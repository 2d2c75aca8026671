"""Verification one decoder block at a time: for models whose float64 reference does not fit into memory.

Each block, with its real weights, gets the same hidden states in ours and in transformers' (built with one layer);
then the final norm and the head, in slices of the vocabulary. Block by block cannot see a wrong order of blocks, so
the hidden states are chained: the reference's output is the next block's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear

from posttrain_lib.checkpoint.hf import read_headers
from posttrain_lib.checkpoint.verify_checks import WeightsCheck, check_gradients
from posttrain_lib.checkpoint.verify_modules import (
    NOISE_FACTOR,
    Documents,
    compare_modules,
    largest,
    noise_limit,
    one_layer_spec,
    run_block,
)
from posttrain_lib.checkpoint.verify_report import ModuleDifference, VerificationReport, with_first_wrong
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.spec import (
    ModelSpec,
    layer_number,
    layer_parameter_shapes,
    layer_pattern,
    parameter_count,
)
from posttrain_lib.schema.manifests import Check

# A reference without its vocabulary: the embedding and the head are compared apart.
_WITHOUT_VOCABULARY: dict[str, Any] = {
    "vocab_size": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_HEAD_ROWS = 16384  # vocabulary entries compared at a time
# Per block parameter: the float64 reference and its float32 twin (12), or ours in float64 with two sets of gradients.
_BYTES_PER_PARAMETER = 24


def block_bytes(spec: ModelSpec) -> int:
    """Memory that the comparison of one block takes, in bytes; the mapped files are not counted."""
    block = sum(torch.Size(shape).numel() for shape in layer_parameter_shapes(spec.config).values())
    return _BYTES_PER_PARAMETER * max(block, _HEAD_ROWS * spec.config.hidden_size)


class StoredWeights:
    """Tensors of a folder by our names, mapped when asked for."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self._folder, self._entries = folder, read_headers(folder)
        # By pattern, not by the spec's own parameters: what is stored is not what a definition expects to be.
        self._table = dict(spec.weight_map)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._table[layer_pattern(name)].format(n=layer_number(name))
        with safe_open(self._folder / self._entries[stored].file, framework="pt") as shard:
            return shard.get_tensor(stored)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Parameter name within the layer -> tensor, for all that the files hold of it."""
        prefix = "layers.{n}."
        names = [
            ours.removeprefix(prefix)
            for ours, theirs in self._table.items()
            if ours.startswith(prefix) and theirs.format(n=layer) in self._entries
        ]
        return {name: self[f"layers.{layer}.{name}"] for name in names}


def build_block(spec: ModelSpec, weights: StoredWeights, layer: int) -> Decoder:
    """Ours: a decoder of this one layer with its stored weights, float32."""
    block = build_model(one_layer_spec(spec, layer))
    block.layers[0].load_state_dict(weights.layer(layer))
    return block


def build_reference_block(spec: ModelSpec, weights: StoredWeights, layer: int, dtype: torch.dtype) -> Any:
    """transformers': a model of this one layer with its stored weights."""
    from posttrain_lib.adapters.hf_reference import build_reference

    window = spec.config.windows[layer]
    changes = dict(_WITHOUT_VOCABULARY, num_hidden_layers=1)
    if "layer_types" in spec.hf_config or any(spec.config.windows):
        changes["layer_types"] = ["full_attention" if window is None else "sliding_attention"]
    reference = build_reference(spec.hf_config, dtype=dtype, **changes)
    table = {ours: theirs.format(n=0) for ours, theirs in spec.weight_map}
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, stored in weights.layer(layer).items():
            parameters[table[f"layers.{{n}}.{name}"]].copy_(stored)
    return reference


def run_reference_block(reference: Any, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T, D] through the reference's only layer, each document by itself, before the final norm."""
    outputs: list[Tensor] = []
    kept = reference.model.layers[0].register_forward_hook(
        lambda _module, _args, result: outputs.append(result[0] if isinstance(result, tuple) else result)
    )
    try:
        with torch.no_grad():
            dtype = next(reference.parameters()).dtype
            for part in hidden_TD.to(dtype).split(lengths):
                reference.model(inputs_embeds=part[None], use_cache=False)
    finally:
        kept.remove()
    return torch.cat([output[0] for output in outputs])


@dataclasses.dataclass
class _Worst:
    """The part nearest to its limit; once a part is beyond it, that first one."""

    floor: float = 0.0
    difference: float = 0.0
    limit: float = 0.0
    scale: float = 0.0
    wrong: str | None = None
    _share: float = -1.0

    def add(self, name: str, ours: Tensor, other: Tensor, floor: float, exact: Tensor) -> bool:
        """Compare a part with another version of it; True where they agree within the noise of ``floor``."""
        difference, limit = largest(ours - other), noise_limit(floor, exact)
        agrees = difference <= limit  # False for NaN
        share = difference / limit if limit > 0 else float(difference > 0)
        if self.wrong is None and (not agrees or share > self._share):
            self.floor, self.difference, self.limit, self.scale = floor, difference, limit, largest(exact)
            self._share, self.wrong = share, None if agrees else name
        return agrees


def verify_blocks(
    spec: ModelSpec,
    folder: Path,
    documents: Documents,
    *,
    block: Callable[[ModelSpec, StoredWeights, int], Decoder] = build_block,
) -> VerificationReport:
    """The report of a comparison block by block. ``block`` makes ours, apart so that a test can make a wrong one."""
    weights, found, packing = StoredWeights(spec, folder), _Worst(), _Worst()
    modules: list[ModuleDifference] = []
    hidden = torch.nn.functional.embedding(documents.token_ids, weights["embed_tokens.weight"]).float()
    bits = WeightsCheck()
    for layer in range(spec.config.num_hidden_layers):
        ours = block(spec, weights, layer)
        with torch.no_grad():
            packed = run_block(ours, hidden, documents.lengths)
            alone = torch.cat([run_block(ours, part, (len(part),)) for part in hidden.split(documents.lengths)])
        reference = build_reference_block(spec, weights, layer, torch.float32)
        coarse = run_reference_block(reference, hidden, documents.lengths)
        fine = run_reference_block(reference.double(), hidden, documents.lengths)
        floor = largest(coarse - fine)
        if not found.add(f"layers.{layer}", packed, fine, floor, fine) and not modules:
            modules = _inside(spec, weights, layer, ours, hidden, documents)
        packing.add(f"layers.{layer}", alone, packed, floor, fine)
        held = dict(ours.layers[0].named_parameters())
        for name, stored in weights.layer(layer).items():
            bits.add(f"layers.{layer}.{name}", held.get(name), stored)
        hidden = coarse
    _compare_head(spec, weights, hidden, found)
    checks = (
        Check(
            "blocks",
            found.wrong is None,
            found.difference,
            found.limit,
            "hidden states of every block and slices of the logits against transformers' float64, each within "
            f"{NOISE_FACTOR:g} times its float32's distance",
        ),
        bits.check(),
        Check(
            "packed = alone, hidden states",
            packing.wrong is None,
            packing.difference,
            packing.limit,
            packing.wrong or "every block, float32",
        ),
        *check_gradients(spec, lambda layer: block(spec, weights, layer), documents.lengths),
    )
    report = VerificationReport(
        folder=str(folder),
        family=spec.family,
        tier="blocks",
        seed=0,
        parameters=parameter_count(spec.config),
        documents=documents.lengths,
        noise_floor=found.floor,
        difference=found.difference,
        logit_scale=found.scale,
        checks=checks,
    )
    report = with_first_wrong(report, modules)
    return report if report.first_wrong_module else dataclasses.replace(report, first_wrong_module=found.wrong)


def _inside(
    spec: ModelSpec, weights: StoredWeights, layer: int, ours: Decoder, hidden: Tensor, documents: Documents
) -> list[ModuleDifference]:
    """The modules of one block, under their names in the whole model."""

    def run(decoder: Decoder) -> None:
        with torch.no_grad():
            run_block(decoder, hidden, documents.lengths)

    found = compare_modules(
        ours,
        one_layer_spec(spec, layer),
        lambda dtype: build_reference_block(spec, weights, layer, dtype),
        run,
        lambda reference: run_reference_block(reference, hidden, documents.lengths),
        documents.positions,
    )
    inside = [item for item in found if item.name.startswith("layers.") or item.name == "rotary_embedding"]
    return [
        dataclasses.replace(
            item,
            name=item.name.replace("layers.0.", f"layers.{layer}."),
            reference=item.reference.replace("layers.0.", f"layers.{layer}."),
            detail=item.detail and item.detail.replace("layers.0.", f"layers.{layer}."),
        )
        for item in inside
    ]


def _compare_head(spec: ModelSpec, weights: StoredWeights, hidden: Tensor, found: _Worst) -> None:
    """Final norm and head: ours as the spec ties it, transformers' as its configuration does."""
    from posttrain_lib.adapters.hf_reference import build_reference
    from posttrain_lib.models.blocks import RMSNorm

    norm = RMSNorm(spec.config.hidden_size, spec.config.rms_norm_eps)
    changes = dict(_WITHOUT_VOCABULARY, num_hidden_layers=0)
    if "layer_types" in spec.hf_config:
        changes["layer_types"] = []
    reference = build_reference(spec.hf_config, dtype=torch.float32, **changes)
    theirs = reference.model.norm
    with torch.no_grad():
        norm.weight.copy_(weights["norm.weight"])
        theirs.weight.copy_(weights["norm.weight"])
        ours, coarse = norm(hidden), theirs(hidden)
        fine = theirs.double()(hidden.double())
    found.add("norm", ours, fine, largest(coarse - fine), fine)
    # The tie is read from both sides: a wrong one multiplies by another matrix.
    own = weights["embed_tokens.weight" if spec.config.tie_word_embeddings else "lm_head.weight"]
    tied = bool(reference.config.tie_word_embeddings)
    other = weights["embed_tokens.weight" if tied else "lm_head.weight"]
    for start in range(0, spec.config.vocab_size, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        exact = linear(fine, other[rows].double())
        floor = largest(linear(coarse, other[rows].float()) - exact)
        found.add("lm_head", linear(ours, own[rows].float()), exact, floor, exact)
