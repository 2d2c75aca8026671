"""``python -m steps.prepare_data inspect``: rows of the prepared data on the terminal, or as a page."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.data.inspection import REFUSED, Found, Inspection
from posttrain_lib.data.inspection_view import (
    ShownDocument,
    ShownRow,
    as_text,
    described,
    pack_line,
    visible,
    weight_of,
)
from posttrain_lib.data.prepare import HELD_OUT, QUARANTINE, TRAIN
from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.store import Store, disk_errors
from posttrain_lib.schema.manifests import StepManifest
from steps import inputs, prepare_data
from steps.base import Step, content_key
from steps.inspect_page import page
from steps.pipeline import add_config_arguments, plain_errors
from steps.start_from import with_models_found

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PROGRAM = "python -m steps.prepare_data inspect"
_EXAMPLES = f"""examples:
  the row that an error or a receipt named, on the terminal:
    {PROGRAM} --config configs/sft/default.yaml --row "generated: generated.jsonl:17"
  the five longest rows with every token, as a page:
    {PROGRAM} --config configs/sft/default.yaml --longest 5 --tokens --html rows.html

The data must be prepared (python -m steps.prepare_data with the same --config and --set). Trained tokens are green on
a terminal, and stand in «» where there is no colour; FORCE_COLOR=1 keeps the colours through a pipe to `less -R`.
"""
_BAR_COLUMNS = 72
_TRAINED, _UNTRAINED, _SPECIAL, _OWN = "bold green", "dim", "magenta", "bold black on green"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    with plain_errors():
        config = with_models_found(load_run_config(options.config, options.set))
        inspection = open_prepared(config, _preparing(options))
        found, headline = choose(inspection, options)
        rows = inspection.show(found)
        if options.html is not None:
            with disk_errors("writing the page", options.html):
                text = page(f"{config.name}: {headline}", rows, steps=config.train.steps, tokens=options.tokens)
                options.html.write_text(text, encoding="utf-8")
            print(f"{headline}; written to {options.html.resolve()}")
            return
        console = _console()
        _print(console, (headline, ""))
        for row in rows:
            print_row(console, row, steps=config.train.steps, tokens=options.tokens)


def open_prepared(config: RunConfig, preparing: str) -> Inspection:
    """What was prepared with this run file, from the store; of a preparation that stopped, its quarantine.

    Args:
        preparing: the command that prepares it.

    Raises:
        StoreError: it was not prepared; says what to run.
    """
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

    store = Store()
    manifests: dict[str, StepManifest] = {}
    folder, stale = _result(store, inputs.STEP, config, manifests)
    if folder is not None:
        folder, stale = _result(store, prepare_data.STEP, config, manifests)
    if folder is None:
        raise StoreError(
            "the data of this run file is not prepared",
            where=store.root,
            got=stale,
            fix=f"prepare it first: {preparing}",
        )
    refs = prepare_data.STEP.inputs(config, manifests)
    template = refs["chat_template"].uri if "chat_template" in refs else None
    data = config.data.model_copy(update={"chat_template": template})
    tokenizer = ChatTokenizer(
        refs["tokenizer"].uri,
        chat_template=template,
        template_date=data.template_date,
        template_kwargs=data.template_kwargs,
        engine="hf",  # the few rows here are not worth a gate
    )
    rows = {source.name: refs[f"source:{source.name}"].uri for source in data.sources}
    return Inspection(folder, data, config.train, tokenizer, rows)


def _result(store: Store, step: Step, config: RunConfig, manifests: dict[str, StepManifest]) -> tuple[Path | None, str]:
    """The folder of a step's result, added to ``manifests``; else None, and how the newest one differs."""
    key, parts = content_key(step, config, step.inputs(config, manifests))
    with store.lock(step.name, key):
        found = store.find(step.name, key)
    if found is not None:
        manifests[step.name] = found
        return store.result_folder(step.name, key), ""
    stopped = store.work_folder(step.name, key)
    if (stopped / QUARANTINE).is_file():
        print("the preparation stopped with an error; only what it refused can be looked at", file=sys.stderr)
        return stopped, ""
    newest = store.newest(step.name)
    if newest is None:
        return None, f"no result of the step {step.name} in the store"
    changed = [name for name, value in parts.items() if newest.key_parts.get(name) != value]
    return None, f"the newest result of {step.name} ({newest.key[:12]}) was made with other {' and '.join(changed)}"


def choose(inspection: Inspection, options: argparse.Namespace) -> tuple[list[Found], str]:
    """The rows that the command line asks for, and a line on what they are.

    Raises:
        DataError: there is no such row.
    """
    split = HELD_OUT if options.held_out else TRAIN
    if options.row:
        found = [
            row
            for name in options.row
            for row in (inspection.example(int(name), split) if name.isdecimal() else inspection.row(name))
        ]
        return found, f"{len(found)} row(s)"
    if options.refused is not None:
        found, counts = inspection.refused(options.refused or None, options.most)
        listed = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()) or "nothing"
        return found, f"refused or left out: {listed}; {len(found)} shown"
    if options.longest is not None:
        return inspection.longest(options.longest, split), f"the rows with the longest documents, {split}"
    return inspection.random(options.random, split, options.seed), f"rows at random (--seed {options.seed}), {split}"


def print_row(console: Console, row: ShownRow, *, steps: int | None, tokens: bool) -> None:
    """One row: what it says, its documents in colour, and where they are packed."""
    from rich.rule import Rule

    kind = f" · {row.kind}" if row.kind else ""
    console.print(
        Rule(_text((f"{visible(row.source)}: {visible(row.row_id)} · {row.split}{kind}", "bold")), style="dim")
    )
    for name, reason, detail in row.refusals:
        verb = "refused" if row.split == REFUSED else "left out"
        _print(console, (f"{verb} {visible(name)}: {reason}: {visible(detail, lines=False)}", "bold red"))
    for warning in row.warnings:
        _print(console, (f"warning: {visible(warning, lines=False)}", "bold yellow"))
    for said in row.said:
        _print(console, (f"{visible(said.role):>10} ", "bold cyan"), (_indented(said.text), ""))
        for name, text in said.notes:
            _print(console, (f"{visible(name):>10} ", "yellow"), (_indented(text), ""))
    if not row.said:
        _print(console, (visible(as_text(row.raw), lines=False), ""))
    for number, document in enumerate(row.documents, 1):
        console.print()
        _print(console, (f"document {number} of {len(row.documents)}  {visible(document.row_id)}", "bold"))
        _print(console, (described(document), ""))
        _print(console, *coloured(document, marks=console.color_system is None))
        if tokens:
            _print_tokens(console, document)
        _print_pack(console, document, steps)
    console.print()


def coloured(document: ShownDocument, *, marks: bool = False) -> list[tuple[str, str]]:
    """The document's text as (text, style), trained tokens green; with ``marks`` also between « and ».

    A weight other than 1 stands before the tokens that have it, as (x0.5).
    """
    parts: list[tuple[str, str]] = []
    before = 0.0
    for piece in document.pieces:
        weight = weight_of(document, piece)
        if weight != before:
            if marks and before:
                parts.append(("»", ""))
            if weight not in (0.0, 1.0):
                parts.append((f"(x{weight:g})", "yellow"))
            if marks and weight:
                parts.append(("«", ""))
        special = bool(document.special[piece.begin])
        style = f"{_TRAINED} underline" if weight and special else _TRAINED if weight else ""
        parts.append((visible(piece.text), style or (_SPECIAL if special else _UNTRAINED)))
        before = weight
    return [*parts, ("»", "")] if marks and before else parts


def _print_pack(console: Console, document: ShownDocument, steps: int | None) -> None:
    if document.pack is None:
        _print(console, (f"not packed: {document.pack_note}", "yellow"))
        return
    pack = document.pack
    _print(console, (pack_line(pack, document, steps), ""))
    edges = [round(item.begin / pack.row_tokens * _BAR_COLUMNS) for item in pack.documents]
    ends = [*edges[1:], round(pack.used / pack.row_tokens * _BAR_COLUMNS)]
    bar: list[tuple[str, str]] = []
    for number, (item, begin, end) in enumerate(zip(pack.documents, edges, ends, strict=True)):
        own = item.example == document.example
        shade = "█" if own else "▒░"[number % 2]
        bar.append((shade * max(end - begin, int(own)), "green" if own else "dim"))
    _print(console, ("[", ""), *bar, ("·" * max(0, _BAR_COLUMNS - ends[-1]), "dim"), ("]", ""))
    for item in pack.documents:
        mark, style = ("->", "green") if item.example == document.example else ("  ", "dim")
        shared = f", {item.shared:,} shared" if item.shared else ""
        line = f"{mark} {item.begin:>7,} {item.tokens:>7,} tokens  {visible(item.name)}{shared}"
        _print(console, (line, style))


def _print_tokens(console: Console, document: ShownDocument) -> None:
    _print(console, (f"{'index':>7}{'id':>9}{'weight':>8}  {'role':<10} piece", "bold"))
    for piece in document.pieces:
        for index in range(piece.begin, piece.end):
            weight = float(document.weights[index])
            role = document.roles[index] if document.roles else "?"
            text = repr(piece.text) if index == piece.begin else "(of the same character)"
            style = _TRAINED if weight else _SPECIAL if document.special[index] else _UNTRAINED
            line = f"{index:>7}{int(document.ids[index]):>9}{weight:>8g}  {visible(role):<10} {visible(text)}"
            _print(console, (line, style))


def _print(console: Console, *parts: tuple[str, str]) -> None:
    # The terminal breaks the lines: breaking them here would eat spaces that the tokens have.
    console.print(_text(*parts), soft_wrap=True)


def _text(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _indented(text: str) -> str:
    return visible(text, lines=False).replace("\n", "\n" + " " * 11)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _preparing(options: argparse.Namespace) -> str:
    command = ["python", "-m", "steps.prepare_data", "--config", str(options.config)]
    for override in options.set:
        command += ["--set", override]
    return shlex.join(command)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Show rows of the prepared data: messages, token ids, what is trained (in colour), the packed row.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--row",
        action="append",
        metavar="ID",
        help="a row by its id (file.jsonl:17, also with its source before it and #turn3 behind it), "
        "or by the number of its example in the store; may be given several times",
    )
    which.add_argument("--random", type=_count, default=1, metavar="K", help="K rows at random (default: %(default)s)")
    which.add_argument("--longest", type=_count, metavar="K", help="the K rows with the longest documents")
    which.add_argument("--refused", nargs="?", const="", metavar="REASON", help="refused rows, of one reason or of all")
    parser.add_argument("--held-out", action="store_true", help="of the held-out rows instead of the training rows")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    parser.add_argument(
        "--most", type=_count, default=10, metavar="K", help="refused rows to show (default: %(default)s)"
    )
    parser.add_argument("--tokens", action="store_true", help="a line for every token: index, id, weight, role, piece")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    return parser


if __name__ == "__main__":
    main()
