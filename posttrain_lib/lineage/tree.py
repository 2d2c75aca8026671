"""A lineage graph as text."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain_lib.lineage.graph import HERE, Graph, Node
from posttrain_lib.schema.manifests import StepManifest

#: characters of a digest that are shown
SHORT = 12
_FILES = 8


def tree(graph: Graph) -> str:
    """One line for each node below the line of what was made from it, the last result first. What stands in several
    places is told once."""
    told: set[str] = set()
    lines = [line for root in reversed(graph.roots) for line in _lines(graph, root, "", "", "", told)]
    return "\n".join(lines)


def title(node: Node) -> str:
    """What it is: step, version and key, or kind and digest."""
    if node.manifest is not None:
        return f"{node.manifest.step} v{node.manifest.version} {node.manifest.key[:SHORT]}"
    assert node.ref is not None
    return f"{node.ref.kind} {node.ref.digest[:SHORT]}"


def code_in_short(manifest: StepManifest) -> str:
    """Commit, and the patch on it."""
    commit = manifest.code.get("commit")
    if commit is None:
        return "no commit"
    if manifest.code.get("uncommitted_changes") != "yes":
        return f"commit {commit[:SHORT]}"
    return f"commit {commit[:SHORT]} + {manifest.code.get('patch', 'changes not kept')[:SHORT]}"


def _lines(graph: Graph, place: str, head: str, indent: str, names: str, told: set[str]) -> Iterator[str]:
    node = graph.nodes[place]
    if place in told:
        yield f"{head}{names}{title(node)} (above)"
        return
    told.add(place)
    state = "" if node.state == HERE else f"  [{node.state.upper() if node.state == 'gone' else node.state}]"
    yield f"{head}{names}{title(node)}{_facts(node)}{state}"
    below = [
        *([("", edge.node, f"{', '.join(edge.names)} <- ") for edge in node.inputs]),
        *((_file(*file), "", "") for file in node.files[:_FILES]),
        *([(f"and {len(node.files) - _FILES} more files", "", "")] if len(node.files) > _FILES else []),
    ]
    for number, (line, child, named) in enumerate(below):
        last = number == len(below) - 1
        branch, further = ("`- ", "   ") if last else ("|- ", "|  ")
        if line:
            yield f"{indent}{branch}{line}"
        else:
            yield from _lines(graph, child, f"{indent}{branch}", f"{indent}{further}", named, told)


def _file(name: str, digest: str) -> str:
    return f"{name} {digest[:SHORT]}"


def _facts(node: Node) -> str:
    if node.manifest is None:
        assert node.ref is not None
        return f"  {node.ref.uri}"
    manifest = node.manifest
    by = "" if manifest.made_by is None else f"  {manifest.made_by.name}"
    origin = manifest.metrics.get("model_origin")
    named = "" if origin is None else f"  the model named {origin['reference']}"
    return f"{by}  {manifest.started_at}  {manifest.seconds:.1f} s  {code_in_short(manifest)}{named}"
