"""A lineage graph as text."""

from __future__ import annotations

from posttrain_lib.lineage.graph import GONE, HERE, Graph, Node
from posttrain_lib.schema.manifests import StepManifest

#: characters of a digest that are shown
SHORT = 12
_FILES = 8


def tree(graph: Graph) -> str:
    """One line for each node below the line of what was made from it, the last result first. What stands in several
    places is told once."""
    lines: list[str] = []
    told: set[str] = set()
    # (branch, indent of what is below, names of the inputs, node or a line); an own stack, for a past may be long
    pending = [("", "", "", root) for root in graph.roots]
    while pending:
        head, indent, names, place = pending.pop()
        node = graph.nodes.get(place)
        if node is None or place in told:
            lines.append(head + names + (place if node is None else f"{title(node)} (above)"))
            continue
        told.add(place)
        lines.append(f"{head}{names}{title(node)}{_facts(node)}{_state(node)}")
        below = [
            *((f"{', '.join(edge.names)} <- ", edge.node) for edge in node.inputs),
            *(("", at) for at in _files(node)),
        ]
        for number, (named, child) in reversed(list(enumerate(below))):
            branch, further = ("`- ", "   ") if number == len(below) - 1 else ("|- ", "|  ")
            pending.append((indent + branch, indent + further, named, child))
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


def _state(node: Node) -> str:
    return "" if node.state == HERE else f"  [{node.state.upper() if node.state == GONE else node.state}]"


def _files(node: Node) -> list[str]:
    shown = [f"{name} {digest[:SHORT]}" for name, digest in node.files[:_FILES]]
    return [*shown, f"and {len(node.files) - _FILES} more files"] if len(node.files) > _FILES else shown


def _facts(node: Node) -> str:
    if node.manifest is None:
        assert node.ref is not None
        return f"  {node.ref.uri}"
    manifest = node.manifest
    by = "" if manifest.made_by is None else f"  {manifest.made_by.name}"
    origin = manifest.metrics.get("model_origin")
    named = "" if origin is None else f"  the model named {origin['reference']}"
    return f"{by}  {manifest.started_at}  {manifest.seconds:.1f} s  {code_in_short(manifest)}{named}"
