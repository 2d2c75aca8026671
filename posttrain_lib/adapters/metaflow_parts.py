"""Small parts of Metaflow cards. Text of rows reaches a card through here alone."""

from __future__ import annotations

import html
import re

from metaflow.cards import Markdown

PASSED, FAILED = "#2e7d32", "#c62828"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
#: what CommonMark, browsers or Python's own str.splitlines take for the end of a line
_LINE_END = re.compile("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def block(inner: str) -> Markdown:
    """Raw HTML as one Markdown block. ``inner`` must hold no empty line: text of rows comes through :func:`escaped`."""
    return Markdown(f"<div>{inner}</div>")


def text(value: str, limit: int = 400) -> Markdown:
    """Text of a row, the first ``limit`` characters of it."""
    shown = value if len(value) <= limit else value[:limit] + " ..."
    return block(f"<span style='font-family:monospace;font-size:12px'>{escaped(shown)}</span>")


def escaped(value: str, line_end: str = "<br>") -> str:
    """Text of a row within one HTML block. An empty line would end the block, and Markdown would read what follows."""
    return _LINE_END.sub(line_end, html.escape(value))
