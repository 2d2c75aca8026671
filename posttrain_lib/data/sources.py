"""Rows out of files: JSON lines, Parquet, Arrow, datasets folders, hub data sets, on disk or behind an fsspec URL."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from posttrain_lib.data import readers
from posttrain_lib.data.readers import BadRow, Place
from posttrain_lib.data.remote import VERSION_FIELDS, file_system, patiently, protocols, version_of
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests, digest_value

_HUB = "hf://"
#: what fsspec itself resolves on the hub: single files
_HUB_FILES = "hf://datasets/"
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = re.compile(r"[*?\[]")
#: what ``datasets`` leaves in the folder of a data set, and of several
_SAVED, _SAVED_INFO, _SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_START = Place(0)

Row = tuple[str, "dict[str, Any] | BadRow"]


def iter_rows(path: str) -> Iterator[Row]:
    """Yield (row id, row) over everything ``path`` names, in a fixed order.

    Row ids are ``file:line`` for JSON lines and ``file:number`` elsewhere, file names without their folder.

    Raises:
        DataError: as :func:`files_of` and :func:`read_from` raise it, or a file has no rows.
    """
    for file in files_of(path):
        found = False
        for _, row_id, row in read_from(file):
            found = True
            yield row_id, row
        if not found:
            raise DataError("the data file has no rows", where=file, fix="remove it from the source, or fill it")


def files_of(path: str) -> list[str]:
    """What :func:`iter_rows` reads, in its order. A datasets folder and a hub id are one "file": themselves.

    Raises:
        DataError: nothing matches, a folder holds several splits, or the store cannot be listed whole.
    """
    if _is_hub_id(path):
        return [path]
    with _client_errors(path):
        return [file for file, _ in _expand(path)]


def read_from(file: str, place: Place = _START) -> Iterator[tuple[Place, str, dict[str, Any] | BadRow]]:
    """Yield (its place, row id, row) for every row of one file of :func:`files_of` from ``place`` on.

    Plain JSON lines are sought to the place, Parquet to its row group, local Arrow and datasets folders to the row;
    a compressed file is decompressed from its start, a JSON array read again, a hub stream skipped through.

    Raises:
        DataError: the file is of an unknown kind, cannot be opened, is damaged (a compressed file that was cut gives
            the rows before the cut first: who counts a file as read waits for its end), was replaced while it was
            read, or its store kept failing. Each names the file.
    """
    with _client_errors(file):
        yield from _read(file, place)


def pinned(path: str) -> str:
    """The path as it means the same everywhere and tomorrow: absolute on local disk, a hub id with its commit.

    Raises:
        DataError: the hub does not answer.
    """
    if _is_hub_id(path):
        name, _, revision = path.removeprefix(_HUB).partition("@")
        return f"{_HUB}{name}@{revision or _hub_commit(name)}"
    return path if "://" in path else str(Path(path).expanduser().absolute())


def digest_rows(path: str, known: FileDigests) -> str:
    """Digest of everything that a :func:`pinned` path names: names and contents, in the order of reading.

    Raises:
        DataError: nothing matches, or a remote store does not tell one version of a file from another.
    """
    return digest_value([[file.rsplit("/", 1)[-1], digest] for file, digest in list_files(path, known)])


def list_files(path: str, known: FileDigests) -> list[tuple[str, str]]:
    """(file, digest) in the order of reading: sha256 on local disk, else what the store tells of the file's version.

    The files of a datasets folder are listed one by one.
    """
    if _is_hub_id(path):
        return [(path, path.partition("@")[2])]
    with _client_errors(path):
        found = _expand(path)
        if found[0][1]["type"] == "directory":  # a datasets folder
            found = _all_below(path)
        return [(file, _file_digest(file, told, known)) for file, told in found]


def _file_digest(file: str, told: dict[str, Any], known: FileDigests) -> str:
    filesystem, inner = file_system(file)
    if "file" in protocols(filesystem):
        return known.file(Path(inner))
    version = version_of(told)
    if not version:
        raise DataError(
            "the store does not tell one version of the file from another, so results could not be reused safely",
            where=file,
            expected=f"one of {', '.join(VERSION_FIELDS)}",
            fix="copy the file to a local disk or an object store",
        )
    return digest_value({**version, "size": told.get("size")})


@contextlib.contextmanager
def _client_errors(where: str) -> Iterator[None]:
    """Every file system has a client with exceptions of its own (credentials, connections, codecs): name the path."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = str(error).strip() or repr(error)
        raise DataError(
            "the data cannot be read",
            where=where,
            got=f"{type(error).__name__}: {text}",
            fix="check the path, the access rights and the file; fetch it again if it is damaged",
        ) from error


def _is_hub_id(path: str) -> bool:
    return path.startswith(_HUB) and not path.startswith(_HUB_FILES)


def _expand(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file, what its store tells of it), of a path, glob or folder, sorted; a datasets folder stands for itself."""
    filesystem, inner = _listing(path)
    told = _info(path, filesystem, inner)
    if told is not None and told["type"] != "directory":
        found = {inner: told}
    elif told is not None:
        if _is_saved(path, filesystem, inner):
            return [(path, told)]
        found = _find(path, filesystem, inner)
    elif match := _MAGIC.search(inner):
        # Not filesystem.glob: where a listing fails, it leaves out what it could not list and says nothing.
        matches = re.compile(glob_translate(inner)).match
        root = inner[: match.start()].rpartition("/")[0]
        found = {name: told for name, told in _find(path, filesystem, root).items() if matches(name)}
    else:
        found = {}
    if not found:
        raise DataError("no file matches the data path", where=path, fix="check the path; a glob needs quotes in YAML")
    return sorted((filesystem.unstrip_protocol(name), told) for name, told in found.items())


def _all_below(folder: str) -> list[tuple[str, dict[str, Any]]]:
    filesystem, inner = _listing(folder)
    found = _find(folder, filesystem, inner)
    return sorted((filesystem.unstrip_protocol(name), told) for name, told in found.items())


def _listing(path: str) -> tuple[Any, str]:
    """(file system, path on it), without what the file system remembers of earlier listings."""
    filesystem, inner = file_system(str(Path(path).expanduser()) if "://" not in path else path)
    filesystem.invalidate_cache()
    return filesystem, inner


def _info(path: str, filesystem: Any, inner: str) -> dict[str, Any] | None:
    """What is at the path; None where nothing is. ``isfile`` and ``exists`` would take any fault for nothing."""
    try:
        return patiently(path, lambda: filesystem.info(inner))
    except FileNotFoundError:
        return None


def _find(path: str, filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """Every file below ``root`` -> what its store tells of it."""
    # s3fs lists flat, page by page, and raises; the others walk, and would leave out a folder that fails.
    options = {} if "s3" in protocols(filesystem) else {"on_error": "raise"}
    try:
        found = patiently(path, lambda: filesystem.find(root, detail=True, **options))
    except FileNotFoundError:
        return {}
    return {
        name: told
        for name, told in found.items()
        if told["type"] == "file" or (told["type"] != "directory" and filesystem.isfile(name))  # a link
    }


def _is_saved(path: str, filesystem: Any, inner: str) -> bool:
    """Whether the folder is one of ``datasets``. Of several splits, which one is meant is the user's to say."""
    inner = inner.rstrip("/")
    if _info(path, filesystem, f"{inner}/{_SAVED_SPLITS}") is not None:
        splits = json.loads(patiently(path, lambda: filesystem.cat_file(f"{inner}/{_SAVED_SPLITS}")))["splits"]
        raise DataError(
            "the datasets folder holds several splits",
            where=path,
            got=", ".join(splits),
            fix=f"name one of them, for example {path.rstrip('/')}/{splits[0]}",
        )
    return all(_info(path, filesystem, f"{inner}/{name}") is not None for name in (_SAVED, _SAVED_INFO))


def _read(file: str, place: Place) -> Iterator[readers.Read]:
    name = file.rstrip("/").rsplit("/", 1)[-1]
    stem, compression = name, None
    for ending, kind in _COMPRESSED.items():
        if name.endswith(ending):
            stem, compression = name.removesuffix(ending), kind
    if _is_hub_id(file):
        yield from readers.numbered(file.removeprefix(_HUB).partition("@")[0], _hub(file, place.row), place.row)
    elif stem.endswith(".json") and readers.is_json_array(file, compression):
        rows = itertools.islice(readers.json_array(file, compression), place.row, None)
        yield from readers.numbered(name, rows, place.row)
    elif stem.endswith(_JSON_LINES):
        yield from readers.json_lines(file, name, compression, place)
    elif stem.endswith(".parquet"):
        yield from readers.numbered(name, readers.parquet(file, place.row), place.row)
    elif stem.endswith(".arrow"):
        yield from readers.numbered(name, readers.arrow([file], place.row), place.row)
    elif parts := _saved_parts(file):
        yield from readers.numbered(name, readers.arrow(parts, place.row), place.row)
    else:
        raise DataError(
            "the data file is of an unknown kind",
            where=file,
            expected=".jsonl or .json (also .gz, .zst), .parquet, .arrow, or a datasets folder",
        )


def _saved_parts(folder: str) -> list[str]:
    """The Arrow files of a datasets folder, in their order; none where it is no such folder."""
    filesystem, inner = file_system(folder)
    inner = inner.rstrip("/")
    try:
        state = json.loads(patiently(folder, lambda: filesystem.cat_file(f"{inner}/{_SAVED}")))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [filesystem.unstrip_protocol(f"{inner}/{part['filename']}") for part in state["_data_files"]]


def _hub(pinned_id: str, first: int) -> Iterator[dict[str, Any]]:
    import datasets

    name, _, revision = pinned_id.removeprefix(_HUB).partition("@")
    stream = datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
    return readers.without_nulls(stream.skip(first))


def _hub_commit(name: str) -> str:
    import huggingface_hub

    with _client_errors(f"{_HUB}{name}"):
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
