"""Formats by name; the fields of a source against those that its format looks for."""

from __future__ import annotations

import importlib

import pytest

from posttrain_lib.data.formats import FORMATS, check_fields, get_format
from posttrain_lib.errors import ConfigError


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_parser_and_fields(name: str) -> None:
    assert callable(get_format(name))
    module, _, attribute = FORMATS[name].partition(":")
    assert attribute == "parse"
    fields = importlib.import_module(module).FIELDS
    assert fields
    assert set(importlib.import_module(module).NEEDED) <= set(fields)
    check_fields(name, {field: f"their_{field}" for field in fields})


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown row format.*is 'messages' meant"):
        get_format("mesages")
    with pytest.raises(ConfigError, match="unknown row format"):
        check_fields("x", {})


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no field 'complete'.*of prompt, completion.*is 'completion' meant"):
        check_fields("prompt_completion", {"prompt": "question", "complete": "answer"})
    with pytest.raises(ConfigError, match="has no field 'xyz'"):
        check_fields("text", {"xyz": "a"})


def test_two_fields_from_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)read from one.*not question for both"):
        check_fields("prompt_completion", {"prompt": "question", "completion": "question"})


def test_a_field_that_every_row_needs_and_whose_name_is_another_s() -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs completion.*what the rows call completion"):
        check_fields("prompt_completion", {"prompt": "completion"})
    check_fields("prompt_completion", {"prompt": "completion", "completion": "prompt"})
    check_fields("alpaca", {"instruction": "input"})
