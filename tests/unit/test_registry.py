"""Names to things, and the options that they take."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import check_options, resolve

TABLE = {"join": "posixpath:join", "gone": "posixpath:nothing"}


def takes(first: object, *, words: int, seed: int = 0) -> None:
    """Something with one leading argument."""


def takes_all(**options: Any) -> None:
    """Something that takes any option."""


def test_a_key_and_its_attribute_are_the_same_thing() -> None:
    assert resolve("join", TABLE, what="tool", where="tools") is resolve("posixpath:join", {}, what="tool", where="t")


@pytest.mark.parametrize(
    ("name", "said"),
    [("jion", "did you mean 'join'"), ("gone", "cannot be imported"), ("no.such:thing", "cannot be imported")],
)
def test_a_name_of_nothing_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        resolve(name, TABLE, what="tool", where="tools.name")
    assert caught.value.where == "tools.name" and name in str(caught.value)


@pytest.mark.parametrize(
    ("named", "options", "given"),
    [
        (takes, {"words": 3}, ()),
        (takes, {}, ("words",)),
        (takes, {"words": 3}, ("words",)),
        (takes_all, {"anything": 1}, ()),
    ],
)
def test_options_that_fit_are_taken(named: Any, options: dict[str, Any], given: tuple[str, ...]) -> None:
    check_options(named, options, what="tool", where="tools", leading=int(named is takes), given=given)


@pytest.mark.parametrize(
    ("named", "options", "said", "expected"),
    [
        (takes, {"wrods": 3}, "did you mean 'words'", "words, seed"),
        (takes, {}, "missing a required", "words, seed"),
        (takes, {"words": 3, "first": 1}, "multiple values", "words, seed"),
        (3, {}, "nothing that can be called", "a function or a class"),
    ],
)
def test_options_that_do_not_fit_are_refused(named: Any, options: dict[str, Any], said: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_options(named, options, what="tool", where="tools.options", leading=1)
    assert caught.value.expected == expected and caught.value.where == "tools.options"


def test_what_the_caller_gives_is_not_asked_of_the_user() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(takes, {"sead": 1}, what="tool", where="tools", leading=1, given=("words",))
    assert caught.value.expected == "seed"
