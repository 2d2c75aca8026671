"""Many short strings in little memory: appended, read back by index."""

from __future__ import annotations

from array import array


class KeyLog:
    """Strings by index. UTF-8 in one buffer and 8 bytes each, where a list of str takes some 80 bytes each."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("Q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, key: str) -> None:
        """Add a string; lone surrogates, which JSON can hold, come back as they were."""
        self._text += key.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def __getitem__(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return self._text[begin : self._ends[index]].decode("utf-8", "surrogatepass")
