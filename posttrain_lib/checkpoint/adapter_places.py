"""Where adapters stand in a family's files, and how adapters of ours and of a stored tensor are made of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.lora import EMBEDDING, Adapted, adaptable_weights
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.weights import stored_shapes

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Member:
    """One of our weights in a stored tensor: its output rows there; ``expert``: which of it, None = all of it."""

    name: str
    rows: slice
    expert: int | None = None


@dataclass(frozen=True)
class Place:
    """A stored tensor that can have an adapter, and what it holds. ``outputs``: its rows, per expert."""

    stored: str
    outputs: int
    members: tuple[Member, ...]

    @property
    def is_module(self) -> bool:
        """Whether PEFT sees a module here; otherwise a parameter that holds all experts."""
        return self.stored.endswith(".weight")

    @property
    def key(self) -> str:
        """What PEFT's configuration calls it."""
        return self.stored.removesuffix(".weight")


@dataclass(frozen=True)
class Values:
    """An adapter with its tensors; ``magnitude`` None without DoRA."""

    adapted: Adapted
    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


def places_of(model: Decoder, spec: ModelSpec) -> list[Place]:
    """Where the weights that can have adapters stand in the family's files, in the files' order."""
    names, shapes = set(adaptable_weights(model)), stored_shapes(spec.pieces)
    members: dict[str, list[Member]] = {}
    outputs: dict[str, int] = {}
    for piece in spec.pieces:
        if piece.ours not in names:
            continue
        first, dim = piece.our_index[0], -1 if piece.transposed else -2
        rows = piece.their_index[dim]
        assert isinstance(rows, slice)
        member = Member(piece.ours, rows, first if isinstance(first, int) else None)
        members.setdefault(piece.theirs, []).append(member)
        outputs[piece.theirs] = shapes[piece.theirs][dim]
    return [Place(stored, outputs[stored], tuple(found)) for stored, found in members.items()]


def joined(place: Place, members: Sequence[Member], values: Mapping[str, Values]) -> Values:
    """One adapter for a stored tensor, of the members that have one; see the module's text."""
    parts = [values[member.name] for member in members]
    if members[0].expert is not None:
        [part], expert = parts, members[0].expert
        return replace(part, down=part.down[expert].contiguous(), up=part.up[expert].contiguous())
    adapted = parts[0].adapted
    if adapted.name == EMBEDDING:
        return parts[0]
    shared = all(torch.equal(part.down, parts[0].down) for part in parts[1:])
    down = parts[0].down if shared else torch.cat([part.down for part in parts], dim=-2)
    rank = down.shape[-2]
    up = down.new_zeros((*down.shape[:-2], place.outputs, rank))
    magnitude = down.new_zeros(place.outputs) if adapted.dora else None
    column = 0
    for member, part in zip(members, parts, strict=True):
        up[..., member.rows, column : column + part.adapted.rank] = part.up
        column += 0 if shared else part.adapted.rank
        if magnitude is not None and part.magnitude is not None:
            magnitude[member.rows] = part.magnitude
    alpha = adapted.scale * (rank**0.5 if adapted.rslora else rank)
    kept = adapted if rank == adapted.rank else replace(adapted, rank=rank, alpha=alpha)
    return Values(kept, down, up, magnitude)


def named_tensors(place: Place, value: Values) -> dict[str, Tensor]:
    """The tensors of the file."""
    module, kind = f"{PREFIX}{place.key}", ("lora_A.weight", "lora_B.weight")
    down, up = value.down, value.up
    if value.adapted.name == EMBEDDING:
        kind = ("lora_embedding_A", "lora_embedding_B")
    elif not place.is_module:
        path, _, leaf = module.rpartition(".")
        # PEFT wraps the experts once per parameter, gate and up first: theirs are the inner names.
        module = path if leaf == "down_proj" else f"{path}.base_layer"
        down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
    tensors = {f"{module}.{kind[0]}": down.contiguous(), f"{module}.{kind[1]}": up.contiguous()}
    if value.magnitude is not None:
        tensors[f"{module}.lora_magnitude_vector"] = value.magnitude
    return tensors
