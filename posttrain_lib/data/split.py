"""Train or held out: by hash of a group key, so that the answer depends on the row alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain_lib.config.data import HeldOut


def is_held_out(group: str, config: HeldOut) -> bool:
    """Whether the rows of ``group`` are held out: so is a share ``fraction`` of all groups, in whatever order."""
    digest = hashlib.sha256(f"{config.seed}\x00{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.fraction * 2**64
