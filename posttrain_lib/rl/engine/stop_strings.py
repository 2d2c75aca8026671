"""Stop strings in tokens that come one by one: only the last ones are made into text again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

#: characters that are kept before what a stop string needs: a tail's first ones may read otherwise than in the whole
#: (half of a character's bytes, a space that belongs to a word's beginning)
_MARGIN = 8


class StopStrings:
    """Watches one completion. The tail that it decodes grows to twice what is needed and is halved then, so that the
    work for each token does not depend on the completion's length."""

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self._strings, self._decode = strings, decode
        self._needed = max(map(len, strings)) + _MARGIN
        self._begin = 0

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether a string is complete in ``tokens``, all tokens of the completion, which one was added to."""
        text = self._decode(tokens[self._begin :])
        if any(string in text for string in self._strings):
            return True
        if len(text) > 2 * self._needed:
            self._shorten(tokens)
        return False

    def _shorten(self, tokens: Sequence[int]) -> None:
        """Tokens may stand for no text at all: that enough of it is left is seen, not assumed."""
        later = (self._begin + len(tokens)) // 2
        if len(self._decode(tokens[later:])) >= self._needed:
            self._begin = later
