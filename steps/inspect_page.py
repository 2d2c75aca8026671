"""The page of ``inspect``: one HTML file that needs nothing else. Everything from a row is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from posttrain_lib.data.inspection import REFUSED
from posttrain_lib.data.inspection_view import (
    Pack,
    Said,
    ShownDocument,
    ShownRow,
    as_text,
    described,
    pack_line,
    visible,
    weight_of,
)

#: documents up to this many tokens are open when the page opens
_OPEN_TOKENS = 1500
_BUBBLES = ("user", "assistant", "system", "tool")

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1c1e21; --pale: #6a6f76; --line: #e2e3e5;
  --trained: 46,160,67; --user: #eef0f3; --assistant: #e3eefc; --special: #8a3ffc; --bad: #b3261e; --chip: #eceef0;
  --even: #b9c0c9; --odd: #d3d8de; --own: #2ea043; }
@media (prefers-color-scheme: dark) { :root { --ground: #131518; --card: #1b1e22; --ink: #e4e6e9; --pale: #969da6;
  --line: #30353b; --user: #272c32; --assistant: #1d3048; --special: #be95ff; --bad: #ff8a80; --chip: #2a2f35;
  --even: #4a525c; --odd: #363d45; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 20px; margin: 0 0 4px } h2 { font-size: 16px; margin: 0; overflow-wrap: anywhere }
h3 { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; color: var(--pale); margin: 20px 0 8px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px 20px;
  margin-top: 20px }
.chip { display: inline-block; background: var(--chip); border-radius: 99px; padding: 0 10px; margin: 6px 6px 0 0;
  font-size: 12px }
.bad { color: var(--bad); font-weight: 600; margin: 8px 0; overflow-wrap: anywhere } .pale { color: var(--pale) }
.said { max-width: 88%; width: fit-content; border-radius: 12px; padding: 8px 14px; margin: 8px 0;
  background: var(--user); white-space: pre-wrap; overflow-wrap: anywhere }
.said.assistant { background: var(--assistant); margin-left: auto }
.said.system, .said.tool, .said.other { background: none; border: 1px dashed var(--line) }
.role { display: block; font-size: 11px; font-weight: 600; color: var(--pale) }
.note { display: block; font-size: 13px; color: var(--pale); border-top: 1px solid var(--line); margin-top: 6px;
  padding-top: 4px }
.tokens { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--pale);
  border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin: 8px 0 }
.tokens span:hover { outline: 1px solid var(--ink) }
.t { background: rgba(var(--trained), calc(.14 + .26 * var(--w, 1))); color: var(--ink) } .s { color: var(--special) }
.t.s { font-weight: 600 }
.p { border-bottom: 1px dotted var(--pale) } sup { font-size: 10px; color: var(--pale) }
summary { cursor: pointer; overflow-wrap: anywhere }
.bar { display: flex; height: 26px; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; margin: 8px 0 }
.bar i { min-width: 1px; background: var(--odd); border-right: 1px solid var(--card) }
.bar i:nth-child(even) { background: var(--even) } .bar i.own { background: var(--own) !important; min-width: 3px }
table { border-collapse: collapse; font: 12px/1.5 ui-monospace, monospace; margin: 8px 0 }
td, th { text-align: left; padding: 1px 14px 1px 0; white-space: pre-wrap; overflow-wrap: anywhere }
td.n, th.n { text-align: right } tr.own td { color: var(--own); font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.5 ui-monospace, monospace }
.legend { font-size: 13px; color: var(--pale); margin: 0 } .legend span { padding: 0 4px; border-radius: 3px }
"""
_LEGEND = (
    "<p class=legend><span class=t>trained</span> · not trained · <span class=s>control token</span> · "
    "<span class=p>shared with the document before</span> · "
    "↵ end of line · hover a token for its id and weight</p>"
)


def page(title: str, rows: Sequence[ShownRow], *, steps: int | None, tokens: bool) -> str:
    """The rows as one page. ``tokens`` adds a table of every token; ``steps`` is the length of the run."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        # Whatever a row says, the page loads and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{_safe(title)}</h1>{_LEGEND}{''.join(_row(row, steps, tokens) for row in rows)}</main></body></html>\n"
    )


def _safe(text: object, *, lines: bool = False) -> str:
    return html.escape(visible(str(text), lines=lines))


def _row(row: ShownRow, steps: int | None, tokens: bool) -> str:
    verb = "refused" if row.split == REFUSED else "left out"
    chips = [row.source, row.split, row.kind]
    parts = [
        f"<h2>{_safe(row.row_id)}</h2>",
        *(f"<span class=chip>{_safe(chip)}</span>" for chip in chips if chip),
        *(
            f"<p class=bad>{verb} {_safe(name)}: {_safe(why)}: {_safe(detail)}</p>"
            for name, why, detail in row.refusals
        ),
        *(f"<p class=bad>{_safe(warning)}</p>" for warning in row.warnings),
        "<h3>Messages</h3>" if row.said else "",
        *(_said(said) for said in row.said),
        *(_document(row, number, steps, tokens) for number in range(len(row.documents))),
        f"<h3>Source</h3><details{'' if row.said else ' open'}><summary>the row as it stands in its file</summary>"
        f"<pre>{_safe(as_text(row.raw))}</pre></details>",
    ]
    return f"<article>{''.join(parts)}</article>"


def _said(said: Said) -> str:
    kind = said.role if said.role in _BUBBLES else "other"
    notes = "".join(f"<span class=note><b>{_safe(name)}</b> {_safe(text)}</span>" for name, text in said.notes)
    return f"<div class='said {kind}'><span class=role>{_safe(said.role)}</span>{_safe(said.text)}{notes}</div>"


def _document(row: ShownRow, number: int, steps: int | None, tokens: bool) -> str:
    document = row.documents[number]
    which = f"Document {number + 1} of {len(row.documents)}" if len(row.documents) > 1 else "Document"
    return (
        f"<h3>{which}</h3><details{' open' if len(document.ids) <= _OPEN_TOKENS else ''}>"
        f"<summary>{_safe(document.row_id)}: {_safe(described(document))}</summary>"
        f"<div class=tokens>{''.join(_pieces(document))}</div></details>"
        f"{_token_table(document) if tokens else ''}{_pack(document, steps)}"
    )


def _pieces(document: ShownDocument) -> Iterable[str]:
    before = 0.0
    for piece in document.pieces:
        ids, weight = document.ids[piece.begin : piece.end], weight_of(document, piece)
        if weight != before and weight not in (0.0, 1.0):
            yield f"<sup>x{weight:g}</sup>"
        before = weight
        index = f"{piece.begin}" if len(ids) == 1 else f"{piece.begin} to {piece.end - 1}"
        role = f" · {document.roles[piece.begin]}" if document.roles else ""
        title = f"token {index} · id {', '.join(map(str, ids.tolist()))} · weight {weight:g}{role}"
        marks = {"t": weight, "s": document.special[piece.begin], "p": piece.begin < document.shared}
        names = [name for name, holds in marks.items() if holds]
        shade = f' style="--w:{min(1.0, weight):g}"' if weight not in (0.0, 1.0) else ""
        classes = f' class="{" ".join(names)}"' if names else ""
        yield f'<span{classes}{shade} title="{_safe(title)}">{_safe(piece.text, lines=True)}</span>'


def _token_table(document: ShownDocument) -> str:
    lines = []
    for piece in document.pieces:
        for index in range(piece.begin, piece.end):
            text = repr(piece.text) if index == piece.begin else "(of the same character)"
            role = document.roles[index] if document.roles else "?"
            own = " class=own" if document.weights[index] else ""
            lines.append(
                f"<tr{own}><td class=n>{index}<td class=n>{int(document.ids[index])}"
                f"<td class=n>{float(document.weights[index]):g}<td>{_safe(role)}<td>{_safe(text)}"
            )
    head = "<tr><th class=n>index<th class=n>id<th class=n>weight<th>role<th>piece"
    return f"<details><summary>every token</summary><table>{head}{''.join(lines)}</table></details>"


def _pack(document: ShownDocument, steps: int | None) -> str:
    if document.pack is None:
        return f"<p class=pale>Not packed: {_safe(document.pack_note)}</p>"
    pack = document.pack
    return (
        f"<h3>Packed row</h3><p class=pale>{_safe(pack_line(pack, document, steps))}</p>"
        f"<div class=bar>{''.join(_bar(pack, document))}</div>"
        f"<details><summary>the documents of that row</summary>{_neighbours(pack, document)}</details>"
    )


def _bar(pack: Pack, document: ShownDocument) -> Iterable[str]:
    for item in pack.documents:
        own = " class=own" if item.example == document.example else ""
        title = _safe(f"{item.name} · {item.tokens:,} tokens from slot {item.begin:,}")
        yield f'<i{own} style="width:{item.tokens / pack.row_tokens:.4%}" title="{title}"></i>'


def _neighbours(pack: Pack, document: ShownDocument) -> str:
    lines = [
        f"<tr{' class=own' if item.example == document.example else ''}><td class=n>{item.begin:,}"
        f"<td class=n>{item.tokens:,}<td class=n>{item.shared:,}<td>{_safe(item.name)}"
        for item in pack.documents
    ]
    head = "<tr><th class=n>slot<th class=n>tokens<th class=n>shared before<th>document"
    return f"<table>{head}{''.join(lines)}</table>"
