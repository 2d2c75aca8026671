"""Plain text without roles: every token of it is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import named_group, only_text, read
from posttrain_lib.schema.examples import PlainText

FIELDS = ("text",)
NEEDED = ("text",)


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> PlainText:
    """Validate a row.

    Raises:
        RefusedRow: no text, or nothing but white space.
    """
    found, names = read(row, FIELDS, fields)
    return PlainText(source, row_id, only_text(found["text"], names["text"]), named_group(row, group_field))
