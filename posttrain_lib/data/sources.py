"""Rows out of files: JSON lines, Parquet, datasets folders and hub data sets, on disk or behind an fsspec URL."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import digest_file, digest_text
from posttrain_lib.lineage.digests import list_files as files_below

_HUB = "hf://"
#: what fsspec itself resolves on the hub: single files
_HUB_FILES = "hf://datasets/"
_JSON_LINES = (".jsonl", ".json", ".ndjson")
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
    if _is_hub_id(path):
        yield from _hub_rows(path.removeprefix(_HUB))
        return
    _refuse_dataset_dict(path)
    if _is_datasets_folder(path):
        yield from _numbered(Path(path).name, _saved_dataset(path))
        return
    for file in _expand(path):
        found = False
        for row in _file_rows(file):
            found = True
            yield row
        if not found:
            raise DataError("the data file has no rows", where=file, fix="remove it from the source, or fill it")


def list_files(path: str) -> list[tuple[str, str]]:
    """(file, digest) of everything ``path`` names: sha256 on local disk, else the store's own checksum or version.

    Raises:
        DataError: nothing matches.
    """
    if _is_hub_id(path):
        return [(path, _hub_commit(path.removeprefix(_HUB)))]
    if _is_datasets_folder(path):
        return [(str(file), digest_file(file)) for file in files_below(Path(path))]
    listed = []
    for file in _expand(path):
        filesystem, inner = fsspec.core.url_to_fs(file)
        local = "file" in _protocols(filesystem)
        listed.append((file, digest_file(inner) if local else digest_text(str(filesystem.ukey(inner)))))
    return listed


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
    try:
        filesystem, inner = fsspec.core.url_to_fs(str(Path(path).expanduser()) if "://" not in path else path)
        if filesystem.isdir(inner):
            inner = inner.rstrip("/") + "/**"
        names = [inner] if filesystem.isfile(inner) else filesystem.glob(inner)
        found = sorted(filesystem.unstrip_protocol(name) for name in names if filesystem.isfile(name))
    except (ImportError, ValueError) as error:
        raise DataError("the data path is of an unknown kind", where=path, got=error) from error
    except OSError as error:
        raise DataError(
            "the data path cannot be read", where=path, got=error, fix="check the path and access"
        ) from error
    if not found:
        raise DataError("no file matches the data path", where=path, fix="check the path; a glob needs quotes in YAML")
    return found


def _file_rows(file: str) -> Iterator[Row]:
    name = file.rsplit("/", 1)[-1]
    stem, compression = name, None
    for ending, kind in _COMPRESSED.items():
        if name.endswith(ending):
            stem, compression = name.removesuffix(ending), kind
    try:
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
    except (OSError, EOFError) as error:
        raise DataError("the data file cannot be read", where=file, got=error, fix="fetch it again") from error


def _is_array(file: str, compression: str | None) -> bool:
    with fsspec.open(file, "rb", compression=compression) as handle:
        return handle.read(256).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _json_array(file: str, compression: str | None) -> Iterator[dict[str, Any]]:
    with fsspec.open(file, "rb", compression=compression) as handle:
        try:
            rows = json.loads(handle.read())
        except ValueError as error:
            raise DataError(
                "the file starts as a JSON array and does not end as one", where=file, got=error, fix="write it again"
            ) from error
    yield from rows


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
    except ValueError as error:
        return BadRow("broken_json", str(error), line.decode("utf-8"))
    if not isinstance(row, dict):
        return BadRow("not_an_object", f"the line holds a {type(row).__name__}", line.decode("utf-8"))
    return row


def _parquet(file: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    with fsspec.open(file, "rb") as handle:
        try:
            table = parquet.ParquetFile(handle)
            for group in range(table.num_row_groups):
                yield from table.read_row_group(group).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise DataError("the Parquet file is damaged", where=file, got=error, fix="write it again") from error


def _saved_dataset(path: str) -> Iterator[dict[str, Any]]:
    import datasets

    yield from datasets.load_from_disk(path)


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        yield from _numbered(name, iter(stream))
    except (OSError, ValueError) as error:
        raise DataError(
            "the hub data set cannot be read", where=f"{_HUB}{name}", got=error, fix="check the id and the network"
        ) from error


def _hub_commit(name: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
    except (OSError, ValueError) as error:
        raise DataError(
            "the hub data set cannot be found", where=f"{_HUB}{name}", got=error, fix="check the id and the network"
        ) from error


def _numbered(name: str, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row
