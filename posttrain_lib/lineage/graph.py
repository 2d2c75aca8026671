"""What a result came from, back to the raw files: a graph of steps' results and of what no step made.

An input that lies in a published result came from the step whose manifest stands there, be it of this run or of another
one whose export a run began with; so the graph goes on into that run by itself. What lies elsewhere is raw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from posttrain_lib.lineage.store import Store, first_damage, published_place, read_manifest
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest

HERE, GONE = "here", "gone"
#: steps from a result that are shown where nobody says how many: some generations of models
DEPTH = 12


@dataclass(frozen=True)
class Raw:
    """What has become of something that no step made.

    Attributes:
        state: ``here`` where it is what it was; else in words.
        files: (name, sha256) of the files that it consists of, where they were looked at.
    """

    state: str
    files: tuple[tuple[str, str], ...] = ()


#: of an input, and the step that read it
Look = Callable[[ArtifactRef, StepManifest], Raw]


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

    def nearest(self, steps: int) -> Graph:
        """What lies at most so many steps from a root: a model that is trained further each day has a long past."""
        kept, edge_of = {root: self.nodes[root] for root in self.roots}, list(self.roots)
        for _ in range(steps):
            edge_of = [e.node for place in edge_of for e in self.nodes[place].inputs if e.node not in kept]
            kept |= {place: self.nodes[place] for place in edge_of}
        cut = {
            place: replace(node, inputs=tuple(edge for edge in node.inputs if edge.node in kept))
            for place, node in kept.items()
        }
        return Graph(self.roots, cut)

    def results(self) -> set[tuple[str, str]]:
        """(step, key) of every result."""
        return {(node.manifest.step, node.manifest.key) for node in self.nodes.values() if node.manifest is not None}


def trace(store: Store, manifests: Iterable[StepManifest], look: Look) -> Graph:
    """The graph of all that the results of ``manifests`` came from.

    Args:
        manifests: of a run, or of single results. They are believed where the store has lost its own.
        look: tells what has become of a raw input that a step read.

    Raises:
        StoreError: a manifest in the store cannot be read, or was changed by hand.
    """
    given = {_recorded(store, manifest): manifest for manifest in manifests}
    there = cache(partial(_there, store))
    nodes: dict[str, Node] = {}
    pending = list(given.items())
    while pending:
        folder, manifest = pending.pop(0)
        if str(folder) in nodes:
            continue
        found: dict[str, list[str]] = {}
        for name, ref in manifest.inputs.items():
            place = published_place(ref.uri)
            made = None if place is None else given.get(place[0]) or there(*place)
            if place is not None and made is not None:
                pending.append((place[0], made))
                node = str(place[0])
            else:
                node = f"{ref.uri} {ref.digest}"
                if node not in nodes:
                    nodes[node] = _raw(node, ref, manifest, look)
            found.setdefault(node, []).append(name)
        edges = tuple(Edge(tuple(names), node) for node, names in found.items())
        now = there(folder, manifest.step, manifest.key)
        nodes[str(folder)] = Node(str(folder), _state(store, folder, manifest, now), manifest, inputs=edges)
    used = {edge.node for node in nodes.values() for edge in node.inputs}
    return Graph(tuple(str(folder) for folder in given if str(folder) not in used), nodes)


def result_of(store: Store, uri: str) -> StepManifest | None:
    """The manifest of the published result that a place lies in; None where it lies in none, or that is gone."""
    place = published_place(uri)
    return None if place is None else _there(store, *place)


def _recorded(store: Store, manifest: StepManifest) -> Path:
    """The folder that a result was published as. It is what the result is known by: two stores may have results of
    equal keys that came from different places."""
    own = (manifest.step, manifest.key)
    places = (published_place(ref.uri) for ref in manifest.outputs.values())
    return next((place[0] for place in places if place is not None and place[1:] == own), store.result_folder(*own))


def _now(store: Store, folder: Path, step: str, key: str) -> Path:
    """Where a result is that was published as ``folder``: the store may have moved since."""
    return folder if folder.is_dir() else store.result_folder(step, key)


def _there(store: Store, folder: Path, step: str, key: str) -> StepManifest | None:
    return read_manifest(_now(store, folder, step, key))


def _raw(node: str, ref: ArtifactRef, reader: StepManifest, look: Look) -> Node:
    if published_place(ref.uri) is not None:
        return Node(node, "gone from the store, and no manifest tells what it was made from", ref=ref)
    raw = look(ref, reader)
    return Node(node, raw.state, ref=ref, files=raw.files)


def _state(store: Store, folder: Path, manifest: StepManifest, now: StepManifest | None) -> str:
    """``now``: the manifest that stands in the store."""
    if now is None:
        return GONE
    if _digests(now) != _digests(manifest):
        by = "" if now.made_by is None else f" by {now.made_by.name}"
        return f"made again{by} at {now.started_at}, with other content"
    damage = first_damage(_now(store, folder, manifest.step, manifest.key))
    return HERE if damage is None else f"damaged: {damage}"


def _digests(manifest: StepManifest) -> dict[str, str]:
    return {name: ref.digest for name, ref in manifest.outputs.items()}
