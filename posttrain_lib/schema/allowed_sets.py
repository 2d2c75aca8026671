"""Which tokens each trained token of a batch was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AllowedSets:
    """Sets of tokens, equal ones once, small ones first. N supervised tokens, K ids of all sets together:

        set_of   int64 [N]       number of each token's set; -1: any token could have come
        ids      int64 [K]       the sets end to end, ascending within each
        offsets  int64 [sets+1]  where each of them begins, and the last one ends

    numpy in the packer's arrays, tensors where the batch is tensors.
    """

    set_of: Any
    ids: Any
    offsets: Any

    def map(self, convert: Callable[[Any], Any]) -> AllowedSets:
        """With ``convert`` applied to every array."""
        return AllowedSets(convert(self.set_of), convert(self.ids), convert(self.offsets))
