"""How our parameters and the tensors of a Hugging Face folder correspond: rules of a family, made into pieces.

A rule names patterns; a :class:`Piece` is one region of one parameter and the region of a stored tensor that holds the
same numbers. Loading, exporting, reading a rank's own bytes and checking a folder all go by pieces, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import layer_number, layer_pattern

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Rule:
    """Our parameters ``ours`` and the stored tensor ``theirs``; ``{n}`` is the layer, ``{e}`` the expert.

    * "same": one parameter, one tensor.
    * "rows": the tensor is the parameters one below the other (Phi-3's qkv_proj).
    * "experts": expert e of the one parameter is the tensor of that expert (Qwen3-MoE).
    * "transposed": the last two dimensions are swapped (gpt-oss keeps [in, out]).
    * "alternating": the last dimension of the tensor takes turns between the parameters, ``transposed`` too where they
      are matrices (gpt-oss's gate_up_proj).

    ``float32``: stored in float32 whatever the other tensors are.
    """

    ours: tuple[str, ...]
    theirs: str
    how: Literal["same", "rows", "experts", "transposed", "alternating"] = "same"
    float32: bool = False


@dataclass(frozen=True)
class Piece:
    """``parameter[our_index]`` equals ``tensor[their_index]``, its last two dimensions swapped if ``transposed``."""

    ours: str
    our_index: Index
    theirs: str
    their_index: Index
    transposed: bool = False
    float32: bool = False


def same(ours: str, theirs: str) -> Rule:
    """One to one."""
    return Rule((ours,), theirs)


def pieces_of(rules: tuple[Rule, ...], shapes: Mapping[str, Shape]) -> tuple[Piece, ...]:
    """The pieces of every parameter in ``shapes``, in its order; rules without a parameter in it say nothing.

    Raises:
        ModelError: no rule, or more than one, for a parameter (a mistake in a family file).
    """
    by_pattern: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for place, pattern in enumerate(rule.ours):
            by_pattern.setdefault(pattern, []).append((rule, place))
    found: list[Piece] = []
    for name, shape in shapes.items():
        fitting = by_pattern.get(layer_pattern(name), [])
        if len(fitting) != 1:
            raise ModelError(
                "a parameter needs exactly one rule for its stored tensor",
                where=name,
                got=[rule.theirs for rule, _ in fitting],
                fix="correct the family's rules",
            )
        found.extend(_pieces(*fitting[0], name, shape, shapes))
    return tuple(found)


def _pieces(rule: Rule, place: int, name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
    layer = layer_number(name)
    whole: Index = tuple(slice(0, size) for size in shape)
    theirs = rule.theirs.replace("{n}", str(layer))
    if rule.how == "same":
        yield Piece(name, whole, theirs, whole, float32=rule.float32)
    elif rule.how == "rows":
        before = sum(shapes[pattern.replace("{n}", str(layer))][0] for pattern in rule.ours[:place])
        yield Piece(name, whole, theirs, (slice(before, before + shape[0]), *whole[1:]))
    elif rule.how == "experts":
        for expert in range(shape[0]):
            yield Piece(name, (expert, *whole[1:]), theirs.replace("{e}", str(expert)), whole[1:])
    elif rule.how == "transposed":
        yield Piece(name, whole, theirs, (*whole[:-2], whole[-1], whole[-2]), transposed=True)
    else:
        count, swapped = len(rule.ours), len(shape) == 3
        size = shape[-2] if swapped else shape[-1]
        turns = slice(place, place + count * (size - 1) + 1, count)
        rest = (*whole[:-2], whole[-1]) if swapped else whole[:-1]
        yield Piece(name, whole, theirs, (*rest, turns), transposed=swapped)


def stored_shapes(pieces: tuple[Piece, ...]) -> dict[str, Shape]:
    """Stored tensor name -> shape, in order: as large as the pieces reach."""
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        reach = tuple(part.stop if isinstance(part, slice) else part + 1 for part in piece.their_index)
        # Of parameters that take turns the last one reaches the end.
        known = shapes.get(piece.theirs, reach)
        shapes[piece.theirs] = tuple(map(max, known, reach))
    return shapes


def clipped(piece: Piece, begin: Shape, size: Shape) -> Piece | None:
    """What of a piece lies in the block of its parameter that starts at ``begin``, with indices into that block; None
    where nothing does. A piece takes whole dimensions of its parameter, or one index of the first."""
    ours: list[int | slice] = []
    theirs: list[int | slice] = list(piece.their_index)
    dims = [dim for dim, part in enumerate(piece.our_index) if isinstance(part, slice)]
    if piece.transposed:
        dims[-2:] = dims[-1], dims[-2]
    for dim, part in enumerate(piece.our_index):
        first, end = begin[dim], begin[dim] + size[dim]
        if isinstance(part, int):
            if not first <= part < end:
                return None
            ours.append(part - first)
            continue
        low, high = max(part.start, first), min(part.stop, end)
        if low >= high:
            return None
        ours.append(slice(low - first, high - first))
        place = dims.index(dim)
        stored = theirs[place]
        assert isinstance(stored, slice)
        step = stored.step or 1
        start = stored.start + (low - part.start) * step
        theirs[place] = slice(start, start + (high - low - 1) * step + 1, step)
    return replace(piece, our_index=tuple(ours), their_index=tuple(theirs))
