"""A lineage graph as an SVG picture: what is raw on the left, what was made of it to the right."""

from __future__ import annotations

import html
from graphlib import TopologicalSorter

from posttrain_lib.lineage.graph import HERE, Graph, Node
from posttrain_lib.lineage.tree import SHORT, title

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 230, 46, 90, 18, 10
_STEP, _RAW, _WRONG = "#e3f2fd", "#eeeeee", "#ffcdd2"
_STYLE = "font-family:monospace;font-size:11px"


def picture(graph: Graph) -> str:
    """A whole SVG document. Boxes and lines have tooltips: places, names of inputs."""
    places = _places(graph)
    width = max((x for x, _ in places.values()), default=0) + _WIDTH + _MARGIN
    height = max((y for _, y in places.values()), default=0) + _HEIGHT + _MARGIN
    lines = [
        _line(places[edge.node], places[node.id], ", ".join(edge.names))
        for node in graph.nodes.values()
        for edge in node.inputs
    ]
    boxes = [_box(places[node.id], node) for node in graph.nodes.values()]
    size = f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} style='{_STYLE}'>{''.join([*lines, *boxes])}</svg>"


def _places(graph: Graph) -> dict[str, tuple[int, int]]:
    """Left upper corner of each box: columns by the longest way to something raw, rows by what stands before it."""
    columns: dict[int, list[str]] = {}
    depths = _depths(graph)
    for place in sorted(depths, key=lambda place: depths[place]):
        columns.setdefault(depths[place], []).append(place)
    rows: dict[str, float] = {}
    for depth, column in sorted(columns.items()):
        wanted = {place: _middle([rows[edge.node] for edge in graph.nodes[place].inputs]) for place in column}
        columns[depth] = sorted(column, key=lambda place: (wanted[place], place))
        rows |= {place: float(number) for number, place in enumerate(columns[depth])}
    return {
        place: (_MARGIN + depth * (_WIDTH + _ACROSS), _MARGIN + number * (_HEIGHT + _DOWN))
        for depth, column in columns.items()
        for number, place in enumerate(column)
    }


def _depths(graph: Graph) -> dict[str, int]:
    depths: dict[str, int] = {}
    made_of = {place: [edge.node for edge in node.inputs] for place, node in graph.nodes.items()}
    for place in TopologicalSorter(made_of).static_order():
        depths[place] = 1 + max((depths[before] for before in made_of[place]), default=-1)
    return depths


def _middle(rows: list[float]) -> float:
    return sum(rows) / len(rows) if rows else 0.0


def _line(start: tuple[int, int], end: tuple[int, int], names: str) -> str:
    (x, y), (to_x, to_y) = (start[0] + _WIDTH, start[1] + _HEIGHT // 2), (end[0], end[1] + _HEIGHT // 2)
    bend = (to_x - x) // 2
    curve = f"M{x},{y} C{x + bend},{y} {to_x - bend},{to_y} {to_x},{to_y}"
    return f"<path d='{curve}' fill='none' stroke='#90a4ae'><title>{html.escape(names)}</title></path>"


def _box(place: tuple[int, int], node: Node) -> str:
    x, y = place
    colour = _WRONG if node.state != HERE else _RAW if node.manifest is None else _STEP
    lines = [title(node), _second_line(node)]
    written = "".join(
        f"<text x='{x + 6}' y='{y + 18 + 16 * number}'>{html.escape(line[: _WIDTH // 7])}</text>"
        for number, line in enumerate(lines)
    )
    rect = f"<rect x='{x}' y='{y}' width='{_WIDTH}' height='{_HEIGHT}' rx='4' fill='{colour}' stroke='#607d8b'/>"
    return f"<g>{rect}{written}<title>{html.escape(_tooltip(node))}</title></g>"


def _second_line(node: Node) -> str:
    if node.state != HERE:
        return node.state
    if node.manifest is None:
        assert node.ref is not None
        return node.ref.uri.rpartition("/")[2]
    return node.manifest.started_at[:19] if node.manifest.made_by is None else node.manifest.made_by.name


def _tooltip(node: Node) -> str:
    if node.manifest is None:
        assert node.ref is not None
        return f"{node.ref.uri} sha256 {node.ref.digest} ({node.state})"
    outputs = ", ".join(f"{name} {ref.digest[:SHORT]}" for name, ref in node.manifest.outputs.items())
    return f"{node.manifest.step}/{node.manifest.key}: {outputs} ({node.state})"
