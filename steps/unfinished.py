"""Which settings differ between two runs of a step, and unfinished work that other settings left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.lineage.digests import write_atomically

RECORD = "settings.json"
#: differences that a line names
_NAMED = 4
_MISSING = object()


def changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """('train.seed', '7', '11') of every value that differs between two nested settings."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            below = f"{path}.{name}" if path else str(name)
            yield from changes(before.get(name, _MISSING), after.get(name, _MISSING), below)
    elif _are_sections(before) and _are_sections(after):
        for number in range(max(len(before), len(after))):
            old, new = (each[number] if number < len(each) else _MISSING for each in (before, after))
            yield from changes(old, new, f"{path}[{number}]")
    elif _are_rows(before) and _are_rows(after):
        yield from changes(_by_name(before), _by_name(after), path)
    elif before != after:
        yield path or "config", _shown(before), _shown(after)


def differences(before: Any, after: Any) -> Iterator[str]:
    """'train.seed 7 -> 11' of every value that differs between two nested settings."""
    return (f"{path} {shortened(old)} -> {shortened(new)}" for path, old, new in changes(before, after))


def shortened(text: str, limit: int = 40) -> str:
    """At most ``limit`` characters of a text."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _are_rows(value: Any) -> bool:
    """Whether this is a list of lists that each begin with a name of its own, as [file, first byte, size]."""
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) > 1 for row in value):
        return False
    names = [row[0] for row in value]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _by_name(rows: list[list[Any]]) -> dict[str, list[Any]]:
    return {name: rest for name, *rest in rows}


def told(found: Iterator[str]) -> str:
    """Differences in one line."""
    every = list(found)
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


def record(work: Path, settings: Any) -> None:
    """Leave in a work folder the settings that its work can go on with."""
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / RECORD, json.dumps(settings, indent=1, sort_keys=True))


def left_behind(work: Path, settings: Any) -> str | None:
    """A line about the newest unfinished work of this step, where ``work`` itself is not begun; None where there is
    nothing to tell."""
    if (work / RECORD).is_file():
        return None
    found = _newest_record(work.parent)
    if found is None:
        return None
    folder, known = found
    differs = told(differences(known, json.loads(json.dumps(settings)))) or "another environment or source"
    return f"beginning anew; the unfinished work in {folder} is of other settings ({differs}) and goes on with its own"


def _newest_record(folder: Path) -> tuple[Path, Any] | None:
    """The work folder below ``folder`` that was begun last, and its settings."""
    while True:
        try:
            records = sorted(folder.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)
            return (records[-1].parent, json.loads(records[-1].read_text(encoding="utf-8"))) if records else None
        except FileNotFoundError:
            continue  # a run that got through removed its work meanwhile


def _shown(value: Any) -> str:
    return "(none)" if value is _MISSING else json.dumps(value)
