"""The strings of a nested value."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.words import DEEPEST, strings, with_strings

VALUE = {"a": ["b", {"c d": "e", 3: None}], "f": ("g", 1.5, True)}


def test_every_string_keys_too() -> None:
    assert sorted(strings(VALUE)) == ["a", "b", "c d", "e", "f", "g"]
    assert list(strings("a")) == ["a"]
    assert list(strings(None)) == []


def test_changed_strings_leave_the_rest_and_the_keys_that_templates_look_up() -> None:
    assert with_strings(VALUE, str.upper) == {"a": ["B", {"C D": "E", 3: None}], "f": ["G", 1.5, True]}
    assert VALUE["a"] == ["b", {"c d": "e", 3: None}]


def test_nesting_has_an_end() -> None:
    def nested(depth: int) -> Any:
        return "a" if depth == 0 else [nested(depth - 1)]

    assert list(strings(nested(DEEPEST))) == ["a"]
    with pytest.raises(RefusedRow, match="nested_too_deep"):
        list(strings(nested(DEEPEST + 2)))
