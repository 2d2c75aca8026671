"""Rows out of files: JSON lines, Parquet, datasets folders and hub data sets, on disk or behind an fsspec URL."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests, digest_value
from posttrain_lib.lineage.digests import list_files as files_below

_HUB = "hf://"
#: what fsspec itself resolves on the hub: single files
_HUB_FILES = "hf://datasets/"
_JSON_LINES = (".jsonl", ".json", ".ndjson")
#: by which remote stores tell one version of a file from another
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "VersionId",
    "md5Hash",
    "checksum",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class BadRow:
    """A place where a row should be and cannot be read: kept for the quarantine as it stands."""

    reason: str
    detail: str
    raw: str


Row = tuple[str, "dict[str, Any] | BadRow"]


def iter_rows(path: str) -> Iterator[Row]:
    """Yield (row id, row) over everything ``path`` names, in a fixed order.

    Row ids are ``file:line`` for JSON lines and ``file:number`` elsewhere, file names without their folder.

    Raises:
        DataError: nothing matches, a file is of an unknown kind, empty, or cannot be opened.
    """
    _refuse_dataset_dict(path)
    with _client_errors(path):
        if _is_hub_id(path):
            yield from _hub_rows(path.removeprefix(_HUB))
            return
        if _is_datasets_folder(path):
            yield from _numbered(Path(path).name, _saved_dataset(path))
            return
        files = _expand(path)
    for file in files:
        found = False
        with _client_errors(file):
            for row in _file_rows(file):
                found = True
                yield row
        if not found:
            raise DataError("the data file has no rows", where=file, fix="remove it from the source, or fill it")


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
    """(file, digest) in the order of reading: sha256 on local disk, else what the store tells of the file's version."""
    if _is_hub_id(path):
        return [(path, path.partition("@")[2])]
    _refuse_dataset_dict(path)
    if _is_datasets_folder(path):
        return [(str(file), known.file(file)) for file in files_below(Path(path))]
    with _client_errors(path):
        fsspec.core.url_to_fs(path)[0].invalidate_cache()
        return [(file, _file_digest(file, known)) for file in _expand(path)]


def _file_digest(file: str, known: FileDigests) -> str:
    filesystem, inner = fsspec.core.url_to_fs(file)
    if "file" in _protocols(filesystem):
        return known.file(Path(inner))
    told = filesystem.info(inner)
    version = {name: str(told[name]) for name in _VERSION_FIELDS if told.get(name)}
    if not version:
        raise DataError(
            "the store does not tell one version of the file from another, so results could not be reused safely",
            where=file,
            expected=f"one of {', '.join(_VERSION_FIELDS)}",
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


def _is_datasets_folder(path: str) -> bool:
    return "://" not in path and (Path(path) / "state.json").is_file() and (Path(path) / "dataset_info.json").is_file()


def _refuse_dataset_dict(path: str) -> None:
    """A folder of several splits: which one is meant is the user's to say."""
    if "://" in path or not (Path(path) / "dataset_dict.json").is_file():
        return
    splits = json.loads((Path(path) / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    raise DataError(
        "the datasets folder holds several splits",
        where=path,
        got=", ".join(splits),
        fix=f"name one of them, for example {Path(path) / splits[0]}",
    )


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def _expand(path: str) -> list[str]:
    """The files of a path, glob or folder, sorted."""
    filesystem, inner = fsspec.core.url_to_fs(str(Path(path).expanduser()) if "://" not in path else path)
    if filesystem.isdir(inner):
        inner = inner.rstrip("/") + "/**"
    names = [inner] if filesystem.isfile(inner) else filesystem.glob(inner)
    found = sorted(filesystem.unstrip_protocol(name) for name in names if filesystem.isfile(name))
    if not found:
        raise DataError("no file matches the data path", where=path, fix="check the path; a glob needs quotes in YAML")
    return found


def _file_rows(file: str) -> Iterator[Row]:
    name = file.rsplit("/", 1)[-1]
    stem, compression = name, None
    for ending, kind in _COMPRESSED.items():
        if name.endswith(ending):
            stem, compression = name.removesuffix(ending), kind
    if stem.endswith(".json") and _is_array(file, compression):
        yield from _numbered(name, _json_array(file, compression))
    elif stem.endswith(_JSON_LINES):
        yield from _json_lines(file, name, compression)
    elif stem.endswith(".parquet"):
        yield from _numbered(name, _parquet(file))
    else:
        raise DataError(
            "the data file is of an unknown kind",
            where=file,
            expected=".jsonl or .json (also .gz, .zst), .parquet, or a datasets folder",
        )


def _is_array(file: str, compression: str | None) -> bool:
    with fsspec.open(file, "rb", compression=compression) as handle:
        return handle.read(256).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _json_array(file: str, compression: str | None) -> Iterator[dict[str, Any] | BadRow]:
    with fsspec.open(file, "rb", compression=compression) as handle:
        try:
            rows = json.loads(handle.read())
        except ValueError as error:
            raise DataError(
                "the file starts as a JSON array and does not end as one", where=file, got=error, fix="write it again"
            ) from error
    for row in rows:
        yield row if isinstance(row, dict) else _no_object(row, json.dumps(row))


def _json_lines(file: str, name: str, compression: str | None) -> Iterator[Row]:
    with fsspec.open(file, "rb", compression=compression) as handle:
        # The zstd reader has no lines of its own; the buffer gives them to every kind alike.
        for number, line in enumerate(io.BufferedReader(handle), start=1):
            if not line.strip():
                continue
            yield f"{name}:{number}", _parse(line)


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error), line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", str(error), line.decode("utf-8"))
    return row if isinstance(row, dict) else _no_object(row, line.decode("utf-8"))


def _no_object(value: Any, raw: str) -> BadRow:
    return BadRow("not_an_object", f"the row is a {type(value).__name__}", raw)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column all fields that any of them has; those that are null were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _parquet(file: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    with fsspec.open(file, "rb") as handle:
        table = parquet.ParquetFile(handle)
        for group in range(table.num_row_groups):
            yield from map(_without_nulls, table.read_row_group(group).to_pylist())


def _saved_dataset(path: str) -> Iterator[dict[str, Any]]:
    import datasets

    yield from map(_without_nulls, datasets.load_from_disk(path))


def _hub_rows(pinned_name: str) -> Iterator[Row]:
    import datasets

    name, _, revision = pinned_name.partition("@")
    stream = datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
    yield from _numbered(name, map(_without_nulls, stream))


def _hub_commit(name: str) -> str:
    import huggingface_hub

    with _client_errors(f"{_HUB}{name}"):
        return str(huggingface_hub.HfApi().dataset_info(name).sha)


def _numbered(name: str, rows: Iterator[dict[str, Any] | BadRow]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row
