"""Schedules as AWS EventBridge writes them: minute, hour, day of month, month, day of week, year."""

from __future__ import annotations

import re
from typing import NamedTuple

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


class _Field(NamedTuple):
    name: str
    least: int
    most: int
    words: tuple[str, ...] = ()


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31, ("L", "W", "LW")),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 1, 7, (*_DAYS, "L")),
    _Field("year", 1970, 2199),
)
_DAY_FIELDS = (2, 4)
#: one entry of a field's list: *, a value, a range, each with a step or without; of days also 5W, 6L, 6#3
_ENTRY = re.compile(r"(?P<from>\*|\w+)(-(?P<to>\w+))?(/(?P<step>\d+))?(#[1-5])?")


def check_cron(text: str) -> str:
    """The expression, where every field has values of its own and one of the two day fields is ``?``.

    Raises:
        ValueError: naming the field and what is wrong.
    """
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"{len(fields)} fields where {len(_FIELDS)} are wanted: {', '.join(field.name for field in _FIELDS)}"
        )
    if sum(fields[place] == "?" for place in _DAY_FIELDS) != 1:
        raise ValueError("one of day of month and day of week must be ?, and the other not")
    for place, (field, found) in enumerate(zip(_FIELDS, fields, strict=True)):
        if found == "?" and place in _DAY_FIELDS:
            continue
        for entry in found.split(","):
            _check_entry(field, entry)
    return text


def _check_entry(field: _Field, entry: str) -> None:
    parts = _ENTRY.fullmatch(entry)
    if parts is None or (parts["step"] is not None and int(parts["step"]) == 0):
        raise ValueError(f"{field.name} {entry!r} is no value, list, range or step")
    for value in (parts["from"], parts["to"]):
        number = re.fullmatch(r"(\d+)[LW]?", value or "")
        allowed = value in (None, "*") or value.upper() in field.words
        if not allowed and not (number and field.least <= int(number[1]) <= field.most):
            raise ValueError(f"{field.name} {entry!r} is outside of {field.least} to {field.most}")
