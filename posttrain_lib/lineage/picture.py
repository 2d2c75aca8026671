"""A lineage graph as an SVG picture: what is raw on the left, what was made of it to the right."""

from __future__ import annotations

import html
import itertools
from graphlib import TopologicalSorter

from posttrain_lib.lineage.graph import HERE, Graph, Node
from posttrain_lib.lineage.tree import SHORT, title

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 230, 46, 60, 18, 10
_STEP, _RAW, _WRONG = "#e3f2fd", "#eeeeee", "#ffcdd2"
_STYLE = "font-family:monospace;font-size:11px"


def picture(graph: Graph) -> str:
    """A whole SVG document. Boxes and lines have tooltips: places, names of inputs."""
    depths = _depths(graph)
    places = _places(graph, depths)
    width = max((x for x, _ in places.values()), default=0) + _WIDTH + _MARGIN
    height = max((y for _, y in places.values()), default=0) + _HEIGHT + _MARGIN
    lines = []
    for node in graph.nodes.values():
        for edge in node.inputs:
            lane = [places[edge.node, depth] for depth in range(depths[edge.node], depths[node.id])]
            lines.append(_line([*lane, places[node.id, depths[node.id]]], ", ".join(edge.names)))
    boxes = [_box(places[node.id, depths[node.id]], node) for node in graph.nodes.values()]
    size = f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} style='{_STYLE}'>{''.join([*lines, *boxes])}</svg>"


def _depths(graph: Graph) -> dict[str, int]:
    """Column of each box: the longest way to something that was made of nothing."""
    depths: dict[str, int] = {}
    made_of = {place: [edge.node for edge in node.inputs] for place, node in graph.nodes.items()}
    for place in TopologicalSorter(made_of).static_order():
        depths[place] = 1 + max((depths[before] for before in made_of[place]), default=-1)
    return depths


def _places(graph: Graph, depths: dict[str, int]) -> dict[tuple[str, int], tuple[int, int]]:
    """Left upper corner of each box by (node, its column). What is used further on than in the next column has a lane
    in the columns between, so that its lines pass beside the boxes (Sugiyama, Tagawa and Toda 1981)."""
    last, before = dict(depths), {place: {(place, depths[place] - 1)} for place in depths}
    for node in graph.nodes.values():
        for edge in node.inputs:
            last[edge.node] = max(last[edge.node], depths[node.id] - 1)
            before[node.id].add((edge.node, depths[node.id] - 1))
    columns: dict[int, list[str]] = {}
    for place in depths:
        for column in range(depths[place], last[place] + 1):
            columns.setdefault(column, []).append(place)
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for column in sorted(columns):
        wanted = {}
        for place in columns[column]:
            sources = before[place] if column == depths[place] else {(place, column - 1)}
            heights = [found[each][1] for each in sources if each in found]
            wanted[place] = sum(heights) / len(heights) if heights else 0.0
        y = _MARGIN
        for place in sorted(columns[column], key=lambda place: (wanted[place], place)):
            found[place, column] = (_MARGIN + column * (_WIDTH + _ACROSS), y)
            y += _DOWN + (_HEIGHT if column == depths[place] else 0)
    return found


def _line(corners: list[tuple[int, int]], names: str) -> str:
    """From the right side of the first box through the lanes to the left side of the last."""
    (x, top), *lanes, (to_x, to_top) = corners
    points = [(x + _WIDTH, top + _HEIGHT // 2)]
    for lane_x, y in lanes:
        points += [(lane_x, y), (lane_x + _WIDTH, y)]
    points.append((to_x, to_top + _HEIGHT // 2))
    curve = [f"M{points[0][0]},{points[0][1]}"]
    for (start, y), (end, to_y) in itertools.pairwise(points):
        bend = (end - start) // 2
        curve.append(f"C{start + bend},{y} {end - bend},{to_y} {end},{to_y}")
    drawn = f"<path d='{' '.join(curve)}' fill='none' stroke='#90a4ae'>"
    return f"{drawn}<title>{html.escape(names)}</title></path>"


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
