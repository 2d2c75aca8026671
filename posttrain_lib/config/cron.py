"""Schedules as AWS EventBridge writes them: minute, hour, day of month, month, day of week, year."""

from __future__ import annotations

import re
from typing import NamedTuple

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


class _Field(NamedTuple):
    """``words`` stand for numbers; entries like ``special`` are of this field alone."""

    name: str
    least: int
    most: int
    words: tuple[str, ...] = ()
    special: str = ""


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31, special=r"L|LW|([1-9]|[12]\d|3[01])W"),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 1, 7, _DAYS, special=r"L|[1-7]L|[1-7]#[1-5]"),
    _Field("year", 1970, 2199),
)
_DAY_FIELDS = (2, 4)
_WEEK = 4
#: one entry of a field's list: *, a value, a range, each with a step or without
_ENTRY = re.compile(r"(?P<from>\*|\w+)(-(?P<to>\w+))?(/(?P<step>\d+))?")


def check_cron(text: str) -> str:
    """The expression, where every field has values of its own and one of the two day fields is ``?``.

    Days of the week are names: AWS counts them from 1 = SUN, Argo from 0, and a 2 would be another day on either.

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
            _check_entry(field, entry, by_name=place == _WEEK)
    return text


def _check_entry(field: _Field, entry: str, *, by_name: bool) -> None:
    if field.special and re.fullmatch(field.special, entry.upper()):
        return
    parts = _ENTRY.fullmatch(entry)
    if parts is None or (parts["step"] is not None and int(parts["step"]) == 0):
        raise ValueError(f"{field.name} {entry!r} is no value, list, range or step")
    for value in (parts["from"], parts["to"]):
        if value in (None, "*") or value.upper() in field.words:
            continue
        if not value.isdecimal() or not field.least <= int(value) <= field.most:
            raise ValueError(f"{field.name} {entry!r} is outside of {field.least} to {field.most}")
        if by_name:
            raise ValueError(f"{field.name} {entry!r} is another day on AWS than on Argo: name it, as MON-FRI")
