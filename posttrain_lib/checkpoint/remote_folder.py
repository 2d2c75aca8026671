"""A model in an object store as a local folder: its small files, and a pointer to its weights in place of these.

The steps of a run, tokenizers and configurations read a folder on disk; whatever reads weights follows the pointer
(``checkpoint.weight_files``), each rank to its own byte ranges. The pointer pins every weight file by what the store
tells of its version (an etag and the size, on S3): it is the model's identity in the lineage, and a file that is
replaced later is refused by name. The gate's reference is filled from the same ranges by transformers' own conversion.
Nothing but an export writes weights to a disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain_lib.checkpoint.weight_files import AT_A_TIME, POINTER, StoreFiles, files_below, is_weights
from posttrain_lib.errors import ModelError

_AT_ONCE = 16


def pinned_files(url: str) -> dict[str, dict[str, Any]]:
    """Name -> {"size", ...version} of every file below a store's folder, hidden ones left out: what the model is.

    Raises:
        ModelError: the folder is empty or cannot be read, or the store does not tell versions apart.
    """
    names = [name for name in files_below(url) if not any(part.startswith(".") for part in name.split("/"))]
    files = StoreFiles(url)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(files.pin, names), strict=True))


def fetch_folder(url: str, pins: Mapping[str, Mapping[str, Any]], out: str | Path) -> None:
    """Write a store's folder to ``out`` without its weights, and the pointer to those.

    Args:
        pins: of :func:`pinned_files`; the files must still be these.
        out: created.

    Raises:
        ModelError: a file was replaced since it was pinned, or cannot be read; a name leads out of the folder.
    """
    out, files = Path(out), StoreFiles(url, pins)
    out.mkdir(parents=True, exist_ok=True)
    for name in pins:
        if is_weights(name):
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:  # "m//etc/x" is below "m" in a store
            raise ModelError("a name of the model's files leads out of its folder", where=f"{url}/{name}")
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = files.size(name)
        starts = range(0, size, AT_A_TIME)
        with open(target, "wb") as handle:
            for buffer, _ in files.buffers((name, start, min(size, start + AT_A_TIME)) for start in starts):
                handle.write(buffer)
    weights = {name: dict(pins[name]) for name in sorted(pins) if is_weights(name) and "/" not in name}
    content = {"url": url.rstrip("/"), "files": weights}
    (out / POINTER).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
