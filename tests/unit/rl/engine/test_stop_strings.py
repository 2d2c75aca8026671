"""Stop strings that come over several tokens, seen with the token that completes them, at any length."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.rl.engine.stop_strings import StopStrings

#: some tokens stand for no text (skipped markers), some for half of a character
PIECES = [b"", b"a", b"b", b"ab", b"\xc3", b"\xa9", "é".encode(), b" b a", b"\n", b"aaaa", b"</", b"end>"]


def decode(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode(errors="replace")


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=120),
    st.lists(st.sampled_from(["</end>", "aab", "é", "\n\n", "b a b", "abababababababab"]), min_size=1, max_size=2),
)
def test_found_is_found_in_the_whole_text(tokens: list[int], strings: list[str]) -> None:
    watch = StopStrings(strings, decode)
    for count in range(1, len(tokens) + 1):
        expected = any(string in decode(tokens[:count]) for string in strings)
        assert watch.found(tokens[:count]) == expected
        if expected:
            break


def test_the_work_for_a_token_does_not_grow() -> None:
    decoded: list[int] = []

    def counting(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return decode(tokens)

    watch, tokens = StopStrings(["</end>"], counting), [1, 2] * 500
    for count in range(1, len(tokens) + 1):
        watch.found(tokens[:count])
    assert max(decoded) < 40 and sum(decoded) < 40 * len(tokens)


def test_markers_without_text_push_nothing_out() -> None:
    watch, tokens = StopStrings(["</end>"], decode), [1] * 40 + [10] + [0] * 300 + [11]
    found = [count for count in range(1, len(tokens) + 1) if watch.found(tokens[:count])]
    assert found == [len(tokens)]
