"""Strings come back by index as they were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.key_log import KeyLog


@given(st.lists(st.text(), max_size=20))
def test_keys_come_back(keys: list[str]) -> None:
    log = KeyLog()
    for key in keys:
        log.append(key)
    assert len(log) == len(keys) and [log[index] for index in range(len(log))] == keys


def test_a_lone_surrogate_is_a_key_like_another() -> None:
    log = KeyLog()
    log.append("a\ud800")
    assert log[0] == "a\ud800"
