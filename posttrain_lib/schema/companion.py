"""The frozen model beside a trained one, as a job names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Companion:
    """Where the frozen model is found.

    Attributes:
        kept: "live" (it runs beside the trained one), "base" (the trained one without its adapters), or "stored" (what
            it said of every example was kept).
        folder: Hugging Face folder of a live one.
        tables: of a stored one, by split ("train", "held_out"): the folder of a ``data.signal_table``.
        made_of: digests that the tables must have been made of.
    """

    kept: str
    folder: str | None = None
    tables: Mapping[str, str] = field(default_factory=dict)
    made_of: Mapping[str, str] = field(default_factory=dict)
