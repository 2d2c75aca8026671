"""Documents that share beginnings, written out token by token: what a packed row of segments must be equal to.

A tree is a list of segments (parent, cut, length): a root has parent -1 and cut 0; any other continues the document of
an earlier segment after its first ``cut`` tokens. Nothing here is ranges or gathers: a document is the list of the
places that its tokens have in the row, and who sees whom is a table of all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Segment = tuple[int, int, int]

#: depth 3; branches inside a parent, at its end, inside a grandparent and a great-grandparent, and two roots
TREE: tuple[Segment, ...] = (
    (-1, 0, 7),
    (0, 4, 5),
    (0, 7, 3),
    (-1, 0, 2),
    (1, 6, 6),
    (4, 11, 4),
    (4, 5, 1),
    (5, 3, 8),
    (3, 1, 1),
    (5, 15, 2),
)


def tree_of(choices: Sequence[tuple[int, int, int]], depth: int = 3) -> list[Segment]:
    """Any numbers (a parent, a cut, a length from 1 on) as a tree of at most this depth; zeros are roots."""
    tree: list[Segment] = []
    depths: list[int] = []
    for which, where, length in choices:
        parents = [-1, *(segment for segment, below in enumerate(depths) if below < depth)]
        parent = parents[which % len(parents)]
        cut = 0 if parent < 0 else 1 + where % len(documents(tree)[parent])
        tree.append((parent, cut, length))
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return tree


def documents(tree: Sequence[Segment]) -> list[list[int]]:
    """For each segment, where the tokens of its whole document lie in the row, its own last."""
    found: list[list[int]] = []
    start = 0
    for parent, cut, length in tree:
        before = found[parent][:cut] if parent >= 0 else []
        found.append(before + list(range(start, start + length)))
        start += length
    return found


def row_of(tree: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """(cu_seqlens int32 [n+1], positions int64 [T], parents int32 [n])."""
    ends = [0, *itertools.accumulate(length for _, _, length in tree)]
    positions = [cut + place for _, cut, length in tree for place in range(length)]
    parents = [parent for parent, _, _ in tree]
    return torch.tensor(ends, dtype=torch.int32), torch.tensor(positions), torch.tensor(parents, dtype=torch.int32)


def seen(tree: Sequence[Segment], window: int | None = None) -> Tensor:
    """bool [T, T]: whether the row's token sees the column's."""
    table = torch.zeros(2 * [sum(length for _, _, length in tree)], dtype=torch.bool)
    for document, (_, cut, _) in zip(documents(tree), tree, strict=True):
        for place in range(cut, len(document)):
            first = 0 if window is None else max(0, place - window + 1)
            for other in document[first : place + 1]:
                table[document[place], other] = True
    return table


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: Sequence[Segment], scale: float, window: int | None = None
) -> Tensor:
    """[T, N, H] from [T, N, H] and [T, K, H], with the table of all pairs as mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qnh,knh->nqk", query, key) * scale
    hidden = ~seen(tree, window).to(query.device)
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)
