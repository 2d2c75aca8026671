"""What a result came from, back to the raw files: a graph of steps' results and of what no step made.

An input that lies in a published result came from the step whose manifest stands there, be it of this run or of another
one whose export a run began with; so the graph goes on into that run by itself. What lies elsewhere is raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from posttrain_lib.lineage.store import Store, first_damage, published_place, read_manifest
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest

HERE, GONE = "here", "gone"


@dataclass(frozen=True)
class Raw:
    """What has become of something that no step made.

    Attributes:
        state: ``here`` where it is what it was; else in words.
        files: (name, sha256) of the files that it consists of, where they were looked at.
    """

    state: str
    files: tuple[tuple[str, str], ...] = ()


Look = Callable[[ArtifactRef], Raw]


@dataclass(frozen=True)
class Edge:
    """The inputs of one name each that a step took from one other node."""

    names: tuple[str, ...]
    node: str


@dataclass(frozen=True)
class Node:
    """A step's result (``manifest``), or what no step made or of whose making nothing is known (``ref``).

    Attributes:
        state: ``here``, ``gone``, or in words what is wrong with it.
    """

    id: str
    state: str
    manifest: StepManifest | None = None
    ref: ArtifactRef | None = None
    files: tuple[tuple[str, str], ...] = ()
    inputs: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes by id; ``roots`` are those that nothing in the graph was made from, in the order they were given."""

    roots: tuple[str, ...]
    nodes: dict[str, Node]

    def below(self, root: str) -> Iterator[Node]:
        """``root`` and all that it came from, each once, the nearest first."""
        pending, seen = [root], {root}
        while pending:
            node = self.nodes[pending.pop(0)]
            yield node
            for edge in node.inputs:
                if edge.node not in seen:
                    seen.add(edge.node)
                    pending.append(edge.node)

    def results(self) -> set[tuple[str, str]]:
        """(step, key) of every result."""
        return {(node.manifest.step, node.manifest.key) for node in self.nodes.values() if node.manifest is not None}


def trace(store: Store, manifests: Iterable[StepManifest], look: Look) -> Graph:
    """The graph of all that the results of ``manifests`` came from.

    Args:
        manifests: of a run, or of single results. They are believed where the store has lost its own.
        look: tells what has become of a raw input.

    Raises:
        StoreError: a manifest in the store cannot be read, or was changed by hand.
    """
    given = list(manifests)
    known = {(manifest.step, manifest.key): manifest for manifest in given}
    nodes: dict[str, Node] = {}
    pending = list(given)
    while pending:
        manifest = pending.pop(0)
        if _id(manifest) in nodes:
            continue
        found: dict[str, list[str]] = {}
        for name, ref in manifest.inputs.items():
            made = _maker(store, ref, known)
            if made is not None:
                pending.append(made)
                node = _id(made)
            else:
                node = f"{ref.uri} {ref.digest}"
                if node not in nodes:
                    nodes[node] = _raw(node, ref, look)
            found.setdefault(node, []).append(name)
        edges = tuple(Edge(tuple(names), node) for node, names in found.items())
        nodes[_id(manifest)] = Node(_id(manifest), _state(store, manifest), manifest, inputs=edges)
    used = {edge.node for node in nodes.values() for edge in node.inputs}
    roots = dict.fromkeys(_id(manifest) for manifest in given if _id(manifest) not in used)
    return Graph(tuple(roots), nodes)


def result_of(store: Store, uri: str) -> StepManifest | None:
    """The manifest of the published result that a place lies in: in this store, wherever it stood when that was
    written, or in the one that the place names."""
    place = published_place(uri)
    if place is None:
        return None
    folder, step, key = place
    return read_manifest(store.result_folder(step, key)) or read_manifest(folder)


def _maker(store: Store, ref: ArtifactRef, known: dict[tuple[str, str], StepManifest]) -> StepManifest | None:
    place = published_place(ref.uri)
    if place is None:
        return None
    return known.get(place[1:]) or result_of(store, ref.uri)


def _raw(node: str, ref: ArtifactRef, look: Look) -> Node:
    if published_place(ref.uri) is not None:
        return Node(node, "gone from the store, and no manifest tells what it was made from", ref=ref)
    raw = look(ref)
    return Node(node, raw.state, ref=ref, files=raw.files)


def _id(manifest: StepManifest) -> str:
    return f"{manifest.step}/{manifest.key}"


def _state(store: Store, manifest: StepManifest) -> str:
    folder = store.result_folder(manifest.step, manifest.key)
    there = read_manifest(folder)
    if there is None:
        return GONE
    if {name: ref.digest for name, ref in there.outputs.items()} != {
        name: ref.digest for name, ref in manifest.outputs.items()
    }:
        by = "" if there.made_by is None else f" by {there.made_by.name}"
        return f"made again{by} at {there.started_at}, with other content"
    damage = first_damage(folder)
    return HERE if damage is None else f"damaged: {damage}"
