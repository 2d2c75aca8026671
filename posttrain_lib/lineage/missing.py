"""What of a graph is gone, and what can still be done without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from posttrain_lib.lineage.graph import HERE, Graph, Node


@dataclass(frozen=True)
class Missing:
    """Something that is not what it was.

    Attributes:
        lacking: raw things that are not there and that it would have to be made from; empty where it can be made again.
        whole: results that were made from it and are still there: they can be used, but not made again while a raw
            thing is missing.
    """

    node: Node
    lacking: tuple[Node, ...]
    whole: tuple[Node, ...]


def missing(graph: Graph) -> Iterator[Missing]:
    """Every node that is not as it was, nearest to the roots first."""
    makes: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        for edge in node.inputs:
            makes.setdefault(edge.node, []).append(node.id)
    for node in graph.nodes.values():
        if node.state == HERE:
            continue
        lacking = tuple(each for each in graph.below(node.id) if each.manifest is None and each.state != HERE)
        whole = tuple(each for each in _above(graph, node.id, makes) if each.state == HERE)
        yield Missing(node, lacking, whole)


def _above(graph: Graph, place: str, makes: dict[str, list[str]]) -> Iterator[Node]:
    """All that was made from a node, the nearest first."""
    pending = list(makes.get(place, ()))
    seen = set(pending)
    while pending:
        current = pending.pop(0)
        yield graph.nodes[current]
        further = [each for each in makes.get(current, ()) if each not in seen]
        seen.update(further)
        pending += further
