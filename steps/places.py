"""What a path of a run file names: a folder that is here, or one to be fetched from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain_lib.errors import ConfigError

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(@(?P<revision>.+))?")


def local_folder(path: str, field: str) -> Path | None:
    """The local folder or file that a path names; None where it is a hub id, to be fetched when the run starts.

    Raises:
        ConfigError: neither.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if HUB_ID.fullmatch(path) is None:
        raise ConfigError(
            "the path does not exist",
            where=field,
            got=path,
            expected="an existing path or a hub id owner/name[@revision]"
            + (", SFTFlow/<run id>, SFTFlow/latest, models/<name>" if field == "model.path" else ""),
        )
    return None
