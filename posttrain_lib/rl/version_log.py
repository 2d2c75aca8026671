"""Lines beside a run that tell what each version of its weights did, and no more than its checkpoints know of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain_lib.errors import CheckpointError
from posttrain_lib.lineage.digests import sync_folder, write_atomically


class VersionLog:
    """JSON lines with a ``version`` each, in a file of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, version: int) -> list[dict[str, Any]]:
        """The lines up to a version, from which the run goes on; later ones are cut off. 0: a run begins, with none."""
        lines = read_log(self.path) if self.path.exists() and version else []
        kept = [line for line in lines if line["version"] <= version]
        self.replace(kept)
        return kept

    def replace(self, lines: Iterable[dict[str, Any]]) -> None:
        """These lines and no others; the file has them all, or what it had before."""
        write_atomically(self.path, "".join(map(_text, lines)))
        sync_folder(self.path.parent)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines."""
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(map(_text, lines)))

    def flush(self) -> None:
        """Put the lines on the disk, for a checkpoint that counts on them and is on the disk itself."""
        with open(self.path, "a", encoding="utf-8") as handle:
            os.fsync(handle.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line that a kill tore, within a letter too, is left out: no checkpoint is of a version
    behind it.

    Raises:
        CheckpointError: a line before it is damaged.
    """
    return [_read(line, path, number) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1) if line]


def _read(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise CheckpointError(
            "a line of the run's log is damaged",
            where=f"{path}, line {number}",
            got=f"{line[:80]!r}: {error}",
            fix="bring the file back from a copy, or start the run anew",
        ) from error
    return found


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
