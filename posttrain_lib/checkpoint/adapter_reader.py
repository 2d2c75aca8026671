"""Reading an adapter in PEFT's format: see ``checkpoint.adapters`` for what becomes what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.checkpoint.adapter_places import PREFIX, Member, Place, Values, places_of
from posttrain_lib.checkpoint.hf import stored_name
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.lora import EMBEDDING, HEAD, Adapted
from posttrain_lib.models.spec import ModelSpec

#: settings of PEFT that would change the mathematics, and the values that do not
_INERT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    # The others (PiSSA, OLoRA, CorDA, LoftQ) take a part out of the base's weights, and do it again at each loading.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}
#: what a reward model's head may be called in ``modules_to_save``: PEFT itself adds the names of both habits
_SCORE_HEADS = {"score", "classifier"}
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "base",
}


def read_config(path: Path, *, scores: bool = False) -> dict[str, Any]:
    """adapter_config.json. ``scores``: for a reward model, whose head may come with the adapter.

    Raises:
        ModelError: it is missing or broken, or has a setting that changes what we compute.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "the adapter's configuration cannot be read", where=path, got=error, fix="name a folder in PEFT's format"
        ) from error
    if scores and set(config.get("modules_to_save") or ()) <= _SCORE_HEADS:
        config["modules_to_save"] = None
    for name, harmless in _INERT.items():
        if config.get(name, harmless[0]) not in harmless:
            raise ModelError(
                "the adapter uses a setting of PEFT that is not supported",
                where=f"{path}: {name}",
                got=config[name],
                expected=harmless[0],
                fix="merge the adapter with PEFT (merge_and_unload) and use the merged model",
            )
    return dict(config)


def by_module(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """PEFT's module -> kind of tensor -> tensor."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise ModelError("the adapter has a tensor that is none of LoRA's", where=f"{path}: {name}")
        modules.setdefault(name[len(PREFIX) : -len(suffix)], {})[_SUFFIXES[suffix]] = tensor
    return modules


class AdapterReader:
    """Turns the modules of a PEFT file into adapters of our weights."""

    def __init__(self, model: Decoder, spec: ModelSpec, config: Mapping[str, Any], path: Path) -> None:
        self.model, self.spec, self.config, self.path = model, spec, config, path
        self.parameters, self.shapes = dict(model.named_parameters()), spec.unpadded_shapes()
        self.places = {place.key: place for place in places_of(model, spec)}
        self.head = stored_name(spec, HEAD).removesuffix(".weight")

    def check_bases(self, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        """PEFT adds embedding and head of the base where they have adapters: they must be this base's."""
        for module, kinds in modules.items():
            ours = HEAD if module == self.head and not self.model.config.tie_word_embeddings else EMBEDDING
            if "base" in kinds and not self._is_base(ours, kinds["base"]):
                raise ModelError(
                    "the adapter was made for another base model: it brings another embedding or head",
                    where=f"{self.path}: {module}",
                    fix="name the base model that it was trained on",
                )

    def _is_base(self, name: str, given: Tensor) -> bool:
        own = self.parameters[name].detach()[: self.spec.config.vocab_size].cpu()
        return torch.equal(given.to(own.dtype), own)

    def values(self, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Values]:
        """Our weight -> its adapter; projections of experts that are all zero are left out."""
        found: dict[str, Values] = {}
        experts: dict[str, dict[int, Values]] = {}
        for module, kinds in modules.items():
            if self.model.config.tie_word_embeddings and module == self.head:
                continue
            if not {"down", "up"} <= set(kinds):
                raise ModelError(
                    "the adapter has one of lora_A and lora_B alone", where=f"{self.path}: {module}", got=sorted(kinds)
                )
            place, kinds = self._place(module, kinds)
            for member in self._changed(place, kinds):
                value = self._member(place, member, kinds)
                if member.expert is None:
                    found[member.name] = value
                else:
                    experts.setdefault(member.name, {})[member.expert] = value
        found.update({name: self._stacked(name, parts) for name, parts in experts.items()})
        self._check_tied(modules, found)
        kept = {name: value for name, value in found.items() if value.down.dim() == 2 or value.down.any()}
        for name, value in kept.items():
            self._check_shapes(name, value)
        return kept

    def _place(self, module: str, kinds: Mapping[str, Tensor]) -> tuple[Place, dict[str, Tensor]]:
        """Where a module of the file belongs, and its tensors as that place wants them."""
        if module in self.places and self.places[module].is_module:
            return self.places[module], dict(kinds)
        layer = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts)(\.base_layer)?", module)
        place = None if layer is None else self._fused_experts(layer[1], int(layer[2]), inner=layer[3] is not None)
        if place is None:
            raise ModelError(
                "the adapter changes a module that this model does not have, or that cannot have one here",
                where=f"{self.path}: {module}",
                expected="projections of attention, feed-forward and experts, embedding, head",
                fix="check that the adapter belongs to this model",
            )
        count = self.parameters[place.members[0].name].shape[0]
        if kinds["down"].shape[0] % count or kinds["up"].shape[1] != kinds["down"].shape[0]:
            raise ModelError(
                "the adapter is for another number of experts",
                where=f"{self.path}: {module}",
                got={kind: tuple(tensor.shape) for kind, tensor in kinds.items()},
                expected=f"rank times {count} rows of lora_A and columns of lora_B",
                fix="check that the adapter belongs to this model",
            )
        down, up = kinds["down"].unflatten(0, (count, -1)), kinds["up"].unflatten(1, (-1, count)).permute(2, 0, 1)
        return place, {"down": down, "up": up}

    def _fused_experts(self, path: str, layer: int, *, inner: bool) -> Place | None:
        """The experts' gate and up (inner), or down (outer; gate and up where they alone were adapted)."""
        targets = {str(name).rpartition(".")[2] for name in self.config.get("target_parameters") or ()}
        leaf = "gate_up_proj" if inner or targets == {"gate_up_proj"} else "down_proj"
        stored = f"{path}.{leaf}"
        if stored in self.places:
            return self.places[stored]
        # transformers 5 joins what the files keep expert by expert: gate above up.
        ours = f"layers.{layer}.mlp.experts"
        names = [f"{ours}.{name}" for name in (("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",))]
        if names[0] not in self.parameters:
            return None
        size = self.parameters[names[0]].shape[1]
        members = tuple(Member(name, slice(size * at, size * (at + 1))) for at, name in enumerate(names))
        return Place(stored, size * len(names), members)

    def _changed(self, place: Place, kinds: Mapping[str, Tensor]) -> Sequence[Member]:
        """The members of a stored tensor that its adapter changes; all of them where it is fresh or DoRA."""
        if len(place.members) == 1 or "magnitude" in kinds:
            return place.members
        return [member for member in place.members if kinds["up"][..., member.rows, :].any()] or place.members

    def _member(self, place: Place, member: Member, kinds: Mapping[str, Tensor]) -> Values:
        rank = kinds["down"].shape[-2]
        patterns = self.config.get("alpha_pattern") or {}
        # PEFT's own rule: a pattern matches the end of a name.
        alpha = next(
            (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", place.key)),
            self.config["lora_alpha"],
        )
        kind = Adapted(member.name, rank, alpha, bool(self.config.get("use_rslora")), bool(self.config.get("use_dora")))
        if member.name == EMBEDDING:
            return Values(kind, kinds["down"], kinds["up"], kinds.get("magnitude"))
        magnitude = kinds["magnitude"][member.rows] if "magnitude" in kinds else None
        value = Values(kind, kinds["down"], kinds["up"][..., member.rows, :], magnitude)
        return value if len(place.members) == 1 else _trimmed(value)

    def _stacked(self, name: str, parts: Mapping[int, Values]) -> Values:
        count = self.parameters[name].shape[0]
        ranks = {value.adapted.rank for value in parts.values()}
        if set(parts) != set(range(count)) or len(ranks) > 1:
            raise ModelError(
                "the adapter has some experts of a layer alone, or of different ranks",
                where=f"{self.path}: {name}",
                got=f"experts {sorted(parts)}, ranks {sorted(ranks)}",
                expected=f"all {count} experts, of one rank",
                fix="merge the adapter with PEFT (merge_and_unload) and use the merged model",
            )
        ordered = [parts[expert] for expert in range(count)]
        down, up = torch.stack([value.down for value in ordered]), torch.stack([value.up for value in ordered])
        return Values(ordered[0].adapted, down, up)

    def _check_tied(self, modules: Mapping[str, Mapping[str, Tensor]], found: Mapping[str, Values]) -> None:
        if not self.model.config.tie_word_embeddings or not (EMBEDDING in found or self.head in modules):
            return
        head, value = modules.get(self.head, {}), found.get(EMBEDDING)
        same = (
            value is not None
            and {"down", "up"} <= set(head)
            and torch.equal(head["down"], value.up.t())
            and torch.equal(head["up"], value.down.t())
        )
        if not same:
            raise ModelError(
                "embedding and head of this model are one weight, but the adapter changes them apart",
                where=f"{self.path}: {self.head}",
                expected="the embedding's adapter turned round, as PEFT writes it with ensure_weight_tying",
                fix="train it with ensure_weight_tying, or untie the model (tie_word_embeddings: false) and merge",
            )

    def _check_shapes(self, name: str, value: Values) -> None:
        wanted = value.adapted.shapes(self.shapes[name])
        given = {kind: getattr(value, kind) for kind in wanted}
        got = {kind: None if tensor is None else tuple(tensor.shape) for kind, tensor in given.items()}
        if got != wanted:
            raise ModelError(
                "the adapter does not fit the model's weight",
                where=f"{self.path}: {name}",
                got=got,
                expected=wanted,
                fix="check that the adapter belongs to this model",
            )


def _trimmed(value: Values) -> Values:
    """Without the columns of lora_B that are zero, which a block of several projections has for each of the others."""
    down, up, kind = value.down, value.up, value.adapted
    used = up.flatten(0, -2).any(0)
    if used.all() or not used.any():
        return value
    rank = int(used.sum())
    kind = replace(kind, rank=rank, alpha=kind.scale * (rank**0.5 if kind.rslora else rank))
    return replace(value, adapted=kind, down=down[..., used, :], up=up[..., used])
