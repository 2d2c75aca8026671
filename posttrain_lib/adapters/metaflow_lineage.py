"""The lineage section of a card: a picture of what the run's results came from, and the same as tables."""

from __future__ import annotations

import base64
from typing import Any

from metaflow.cards import Markdown, Table

from posttrain_lib.adapters.metaflow_parts import block, text
from posttrain_lib.lineage.graph import DEPTH, Graph, Node
from posttrain_lib.lineage.picture import picture
from posttrain_lib.lineage.tree import SHORT, code_in_short, title

_STEPS = ["step", "made by", "time", "code", "inputs (sha256)", "outputs (sha256)"]
_RAW = ["what no step made", "place", "files", "state"]


def lineage_parts(whole: Graph) -> list[Any]:
    """Components of the section: the nearest part of the graph."""
    graph = whole.nearest(DEPTH)
    made = [node for node in graph.nodes.values() if node.manifest is not None]
    raw = [node for node in graph.nodes.values() if node.manifest is None]
    parts = [Markdown("## Lineage"), _picture(graph), Table([_made_row(node) for node in made], headers=_STEPS)]
    return [*parts, Table([_raw_row(node) for node in raw], headers=_RAW)] if raw else parts


def _picture(graph: Graph) -> Markdown:
    """As an image of its own document: nothing of a place or a name in it is read as the card's markup."""
    encoded = base64.b64encode(picture(graph).encode("utf-8")).decode("ascii")
    image = f"<img alt='lineage' style='max-width:none' src='data:image/svg+xml;base64,{encoded}'>"
    return block(f"<div style='overflow-x:auto'>{image}</div>")


def _made_row(node: Node) -> list[Any]:
    manifest = node.manifest
    assert manifest is not None
    return [
        text(title(node)),
        text("" if manifest.made_by is None else manifest.made_by.name),
        text("reused" if manifest.reused else f"{manifest.seconds:.1f} s"),
        text(code_in_short(manifest)),
        text(", ".join(f"{name} {ref.digest[:SHORT]}" for name, ref in manifest.inputs.items())),
        text(", ".join(f"{name} {ref.digest[:SHORT]}" for name, ref in manifest.outputs.items())),
    ]


def _raw_row(node: Node) -> list[Any]:
    assert node.ref is not None
    files = ", ".join(f"{name} {digest[:SHORT]}" for name, digest in node.files)
    return [text(title(node)), text(node.ref.uri), text(files), text(node.state)]
