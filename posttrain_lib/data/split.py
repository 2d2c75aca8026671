"""Train or held out: by hash of a group key, so that the answer depends on the row alone."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain_lib.config.data import HeldOut

_PLACES = 2**64


def split_place(group: str, config: HeldOut) -> int:
    """Where the group stands among all that there can be, 0 to 2**64 - 1: those that stand first are held out."""
    digest = hashlib.sha256(f"{config.seed}\x00{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(group: str, config: HeldOut) -> bool:
    """Whether the rows of ``group`` are held out: so is a share ``fraction`` of all groups, in whatever order."""
    return split_place(group, config) < config.fraction * _PLACES


def fraction_up_to(place: int) -> float:
    """The least fraction that holds out a group which stands there."""
    return math.nextafter(place / _PLACES, 1.0)
