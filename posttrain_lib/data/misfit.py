"""Sources of which no row can be used, for one reason: another format is meant, more often than every row is bad."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.data.formats import fields_of, formats_like
from posttrain_lib.errors import DataError

if TYPE_CHECKING:
    from posttrain_lib.config.data import Source
    from posttrain_lib.data.encoding import EncodedRow

#: rows of a source after which it is not read on where all of them were refused for one reason
ROWS_LOOKED_AT = 1000
#: of a row and not of a format: a file may be sorted by length, or begin with what its author keeps out of the loss
_OF_A_ROW = frozenset({"too_long", "nothing_left", "nothing_to_train"})
_NAMED_AT_MOST = 8


@dataclass
class _Seen:
    """Rows of a source; of the first one its reason and detail, and the names of its fields (none where it is no row).
    ``alike``: all were refused, for that reason. ``inner``: a field of the first row that is a list of objects, and
    how many it has."""

    rows: int
    reason: str
    detail: str
    names: tuple[str, ...]
    inner: tuple[str, int] | None
    alike: bool = True


class Misfits:
    """Sees every row of some sources, in the order of reading."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = {source.name: source for source in sources}
        self._seen: dict[str, _Seen] = {}

    def see(self, name: str, row: EncodedRow) -> None:
        """Take in what became of a row of source ``name``."""
        reason, detail = row.refused or ("", "")
        if name not in self._seen:
            names = tuple(map(str, row.raw)) if isinstance(row.raw, dict) else ()
            self._seen[name] = _Seen(0, reason, detail, names, _list_within(row.raw))
        seen = self._seen[name]
        seen.rows += 1
        seen.alike = seen.alike and bool(reason) and reason == seen.reason

    def stop_if_hopeless(self, name: str, quarantine: Path) -> None:
        """Read no further where the first rows were all refused for one reason: the rest would be, too.

        Raises:
            DataError: saying how many rows were looked at, and which format has fields like theirs. ``quarantine`` is
                where a person finds those rows.
        """
        seen = self._seen[name]
        if not seen.alike or seen.rows < ROWS_LOOKED_AT or seen.reason in _OF_A_ROW:
            return
        raise DataError(
            f"the first {seen.rows:,} rows of source {name!r} were all refused for one reason, and no more were read",
            where=quarantine,
            got=f"{seen.reason}; the first: {seen.detail}",
            expected=f"rows of format {self._sources[name].format!r}",
            fix=self._hint(name) or "mend the rows, or name their format (the quarantine has those that were read)",
        )

    def hints(self) -> str:
        """What may be meant instead, for each source of which no row could be used; empty where there is none."""
        found = [(name, self._hint(name)) for name, seen in self._seen.items() if seen.alike]
        return "; ".join(f"source {name!r}: {hint}" for name, hint in found if hint)

    def _hint(self, name: str) -> str:
        """What the rows have, where that is not what their format needs."""
        source, names, inner = self._sources[name], self._seen[name].names, self._seen[name].inner
        lacking = [field for field, called in fields_of(source.format, source.fields) if not called & set(names)]
        if not names or not lacking:
            return ""
        if inner is not None and self._seen[name].rows == 1:
            return f"the file is one object whose {inner[0]!r} is a list of {inner[1]:,}: store that list alone"
        more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
        have = f"the rows have {', '.join(names[:_NAMED_AT_MOST])}{more}"
        if like := [known for known in formats_like(names) if known != source.format]:
            return f"{have}; is format: {' or '.join(like)} meant?"
        return (
            f"{have}, and format {source.format} needs {', '.join(lacking)}: say in data.sources.fields what the rows "
            f"call it, or name another format"
        )


def _list_within(raw: object) -> tuple[str, int] | None:
    for name, value in raw.items() if isinstance(raw, dict) else ():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return str(name), len(value)
    return None
