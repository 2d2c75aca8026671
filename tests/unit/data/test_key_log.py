"""Strings come back by index as they were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.key_log import KeyLog


@given(st.lists(st.text(), max_size=20), st.integers(0, 20))
def test_keys_come_back(keys: list[str], cut: int) -> None:
    log, rest = KeyLog(), KeyLog()
    for key in keys[:cut]:
        log.append(key)
    for key in keys[cut:]:
        rest.append(key)
    log.extend(rest)
    assert [log[index] for index in range(len(log))] == keys


def test_a_lone_surrogate_is_a_key_like_another() -> None:
    log = KeyLog()
    log.append("a\ud800")
    assert log[0] == "a\ud800"
