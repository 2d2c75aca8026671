"""Rows out of files: JSON lines, Parquet, Arrow, datasets folders, hub data sets, on disk or behind an fsspec URL.

A data path is a file, a glob, a folder, a folder that ``datasets`` saved, each of them on local disk or as an fsspec
URL, or a hub id: ``hf://owner/name[@revision][?config=main&split=train_sft]``. The revision is a branch, a tag or a
commit (default: the newest commit), the config one that the data set names (default: its only one, or the one it calls
default), the split is ``train`` unless named. A ``&``, ``=``, ``%`` or ``/`` in a value is percent-encoded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from posttrain_lib.data import readers
from posttrain_lib.data.hub import HUB_FORM, HubId, is_hub_id
from posttrain_lib.data.readers import BadRow, Place
from posttrain_lib.data.remote import VERSION_FIELDS, file_system, patiently, protocols, version_of
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests, digest_value

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_COLUMNS = (".parquet", ".arrow")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_KNOWN_KINDS = ".jsonl, .ndjson or .json (also .gz, .zst), .parquet, .arrow"
_MAGIC = re.compile(r"[*?\[]")
#: what ``datasets`` leaves in the folder of a data set, and of several
_SAVED, _SAVED_INFO, _SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
#: what stands beside data and is none, whatever its ending
_ABOUT_DATA = {_SAVED_INFO, _SAVED_SPLITS, "dataset_infos.json"}
_ABOUT_FOLDER = re.compile(r"(readme|licen[cs]e)([._-].*)?|.*\.crc", re.IGNORECASE)
_NAMED_AT_MOST = 5
_START = Place(0)

Row = tuple[str, "dict[str, Any] | BadRow"]


def iter_rows(path: str) -> Iterator[Row]:
    """Yield (row id, row) over everything ``path`` names, in a fixed order.

    Row ids are ``file:line`` for JSON lines and ``file:number`` elsewhere, files being named by :func:`names_of`.

    Raises:
        DataError: as :func:`files_of` and :func:`read_from` raise it, or a file has no rows.
    """
    files = files_of(path)
    for file, name in zip(files, names_of(files), strict=True):
        found = False
        for _, row_id, row in read_from(file, name=name):
            found = True
            yield row_id, row
        if not found:
            raise DataError("the data file has no rows", where=file, fix="remove it from the source, or fill it")


def files_of(path: str) -> list[str]:
    """What :func:`iter_rows` reads, in its order. A datasets folder and a hub id are one "file": themselves.

    Of a folder, the files of a known kind below it. Files and folders in it whose name starts with ``.`` or ``_``,
    READMEs, licences, checksums and what ``datasets`` tells of the data are no data; anything else is refused. A glob
    and the name of a file are taken at their word.

    Raises:
        DataError: nothing matches, a folder holds several splits or a file of no known kind, a link leads to no file,
            or the store cannot be listed whole.
    """
    if is_hub_id(path):
        return [path]
    with client_errors(path):
        return [file for file, _ in _expand(path)]


def names_of(files: Sequence[str]) -> list[str]:
    """What row ids call each file of a source: its base name; where two share one, the path from their common folder.

    A hub id is called ``owner/name``.
    """
    paths = [[HubId.parse(file).name] if is_hub_id(file) else file.rstrip("/").split("/") for file in files]
    names = [parts[-1] for parts in paths]
    if len(set(names)) == len(names):
        return names
    folders = zip(*(parts[:-1] for parts in paths), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, folders))
    return ["/".join(parts[common:]) for parts in paths]


def read_from(
    file: str, place: Place = _START, name: str | None = None
) -> Iterator[tuple[Place, str, dict[str, Any] | BadRow]]:
    """Yield (its place, row id, row) for every row of one file of :func:`files_of` from ``place`` on.

    ``name`` is what row ids call the file, as :func:`names_of` tells it of all files of a source; default: its base
    name.

    Plain JSON lines are sought to the place, Parquet to its row group, local Arrow and datasets folders to the row;
    a compressed file is decompressed from its start, a JSON array read again, a hub stream skipped through.

    Raises:
        DataError: the file is of an unknown kind, cannot be opened, is damaged (a compressed file that was cut gives
            the rows before the cut first: who counts a file as read waits for its end), was replaced or changed
            while it was read, or its store kept failing. Each names the file.
    """
    with client_errors(file):
        yield from _read(file, place, name or names_of([file])[0])


def pinned(path: str) -> str:
    """The path as it means the same everywhere and tomorrow: absolute on local disk, a hub id with its commit.

    The hub is asked unless the id names a whole commit.

    Raises:
        DataError: the hub does not answer, or has no such data set or revision, or the id is malformed.
    """
    if is_hub_id(path):
        with client_errors(path):
            return str(HubId.parse(path).at_commit())
    return path if "://" in path else str(Path(path).expanduser().absolute())


def digest_rows(path: str, known: FileDigests) -> str:
    """Digest of everything that a :func:`pinned` path names: names and contents, in the order of reading.

    Raises:
        DataError: nothing matches, or a remote store does not tell one version of a file from another.
    """
    found = list_files(path, known)
    names = names_of([file for file, _ in found])
    return digest_value([[name, digest] for name, (_, digest) in zip(names, found, strict=True)])


def list_files(path: str, known: FileDigests) -> list[tuple[str, str]]:
    """(file, digest) as :func:`files_of` lists: sha256 on local disk, else what the store tells of the file's version.

    A datasets folder has the digest of all files in it. A hub id is listed with its commit.
    """
    with client_errors(path):
        if is_hub_id(path):
            hub = HubId.parse(path).at_commit()
            return [(str(hub), hub.version)]
        found = _expand(path)
        if found[0][1]["type"] == "directory":  # a datasets folder
            parts = _all_below(path)
            names = names_of([file for file, _ in parts])
            told = [[name, _file_digest(*part, known)] for name, part in zip(names, parts, strict=True)]
            return [(path, digest_value(told))]
        return [(file, _file_digest(file, told, known)) for file, told in found]


def is_local(file: str) -> bool:
    """Whether the file lies on a disk of this machine, or one that is mounted."""
    return not is_hub_id(file) and "file" in protocols(file_system(file)[0])


def look_of(file: str) -> str:
    """What tells one version of a file of :func:`files_of` from another, without reading it: of local ones size, inode
    and time of the last write, elsewhere the digest of :func:`list_files`.

    Raises:
        DataError: it is gone.
    """
    if not is_local(file):
        return list_files(file, FileDigests())[0][1]
    with client_errors(file):
        found = _expand(file)
        parts = _all_below(file) if found[0][1]["type"] == "directory" else found
        return digest_value([[name, told["size"], told["ino"], told["mtime"]] for name, told in parts])


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
    # A tag says it all. Of the rest, a listing and an answer on one file tell unlike things: versions, split seconds.
    tags = {name: version[name] for name in ("ETag", "etag") if name in version}
    return digest_value({**(tags or version), "size": told.get("size")})


@contextlib.contextmanager
def client_errors(where: str) -> Iterator[None]:
    """Every file system has a client with exceptions of its own (credentials, connections, codecs): name the path."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = str(error).strip() or repr(error)
        raise DataError(
            "the data cannot be read", where=where, got=f"{type(error).__name__}: {text}", fix=_fix_for(error, where)
        ) from error


def _fix_for(error: Exception, where: str) -> str:
    """What to do about a client's exception. Those of botocore are told by name: it is imported for S3 alone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}:
        return (
            "give the store's credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's "
            "role; for a public bucket, anon in fsspec's config"
        )
    if isinstance(error, PermissionError):
        return "check which account the credentials are of, and what it may read"
    if is_hub_id(where):
        return f"check the id ({HUB_FORM}), the access rights and the network"
    return "check the path, the access rights and the file; fetch it again if it is damaged"


def _expand(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file, what its store tells of it), of a path, glob or folder, sorted; a datasets folder stands for itself."""
    filesystem, inner = _listing(path)
    told = _info(path, filesystem, inner)
    if told is not None and told["type"] != "directory":
        found = {inner: told}
    elif told is not None:
        if _is_saved(path, filesystem, inner):
            return [(path, told)]
        found = _data_in(path, inner, _find(path, filesystem, inner))
    elif match := _MAGIC.search(inner):
        # Not filesystem.glob: where a listing fails, it leaves out what it could not list and says nothing.
        matches = re.compile(glob_translate(inner)).match
        below = _find(path, filesystem, inner[: match.start()].rpartition("/")[0])
        found = {
            name: told
            for name, told in below.items()
            if matches(name) or (told["type"] != "file" and filesystem.isdir(name) and _may_hide(name, inner))
        }
    else:
        found = {}
    if not found:
        raise DataError("no file matches the data path", where=path, fix="check the path; a glob needs quotes in YAML")
    if odd := [name for name in found if not _is_text(name)]:
        raise DataError(
            "names of data files are no UTF-8, and a row is named by its file",
            where=path,
            got=_named([os.fsencode(name).decode("utf-8", "backslashreplace") for name in odd]),
            fix="rename them (convmv does so), or name the others by a glob",
        )
    if strays := [name for name, told in found.items() if told["type"] not in ("file", "directory")]:
        raise DataError(
            "links among the data lead to no file: to a folder, or to nothing",
            where=path,
            got=_named(strays),
            fix="mend or remove them; a folder behind a link is read where a source names it",
        )
    return sorted((filesystem.unstrip_protocol(name), told) for name, told in found.items())


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
    """Every file below ``root``, and every link, to whatever -> what its store tells of it."""
    # S3 and the hub list flat, page by page, and raise.
    flat = {"s3", "hf"} & set(protocols(filesystem))
    try:
        found = patiently(path, lambda: filesystem.find(root, detail=True)) if flat else _walk(path, filesystem, root)
    except FileNotFoundError:
        return {}
    return {
        name: {**told, "type": "file"} if told["type"] == "other" and filesystem.isfile(name) else told
        for name, told in found.items()
        if not (name.endswith("/") and not told.get("size"))  # an empty key by which tools mark a folder
        and told["type"] != "directory"
    }


def _walk(path: str, filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """As ``filesystem.find``, which leaves out a folder below ``root`` that it cannot list, and says nothing."""
    found: dict[str, dict[str, Any]] = {}
    pending = [root]
    while pending:
        folder = pending.pop()
        for told in patiently(path, partial(filesystem.ls, folder, detail=True)):
            if told["type"] != "directory":
                found[told["name"]] = told
            elif told["name"].rstrip("/") != folder.rstrip("/"):
                pending.append(told["name"])
    return found


def _may_hide(folder: str, pattern: str) -> bool:
    """Whether what lies below a folder could match the glob."""
    parts, depth = pattern.split("/"), folder.count("/") + 1
    above = glob_translate("/".join(parts[:depth]))
    return "**" in pattern or (depth < len(parts) and re.match(above, folder) is not None)


def _data_in(path: str, folder: str, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of the files found below a folder that are data."""
    data: dict[str, dict[str, Any]] = {}
    unknown: list[str] = []
    passed_over: list[str] = []
    for name, told in found.items():
        parts = name.removeprefix(folder.rstrip("/") + "/").split("/")
        # Beside data, a leading _ marks what a writer keeps for itself, except in the key=value folders of partitions.
        hidden = any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)
        if hidden or parts[-1] in _ABOUT_DATA:
            passed_over.append("/".join(parts))
        elif told["type"] != "file" or _stem(parts[-1])[0].endswith((*_JSON_LINES, *_COLUMNS)):
            data[name] = told
        else:
            (passed_over if _ABOUT_FOLDER.fullmatch(parts[-1]) else unknown).append("/".join(parts))
    wrong = unknown or ([] if data else passed_over)
    if wrong:
        raise DataError(
            "the folder holds files of an unknown kind" if unknown else "the folder holds nothing that is read as data",
            where=path,
            got=_named(wrong),
            expected=_KNOWN_KINDS,
            fix="move the others out of the folder, or let their names begin with _; data.sources take a glob, too",
        )
    return data


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST:,} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(sorted(names)[:_NAMED_AT_MOST]) + more


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


def _stem(name: str) -> tuple[str, str | None]:
    """A file's name without the ending of its compression, and the compression."""
    for ending, compression in _COMPRESSED.items():
        if name.endswith(ending):
            return name.removesuffix(ending), compression
    return name, None


def _read(file: str, place: Place, name: str) -> Iterator[readers.Read]:
    stem, compression = _stem(file.rstrip("/"))
    if is_hub_id(file):
        yield from readers.numbered(name, HubId.parse(file).rows(place.row, _rows_of_file), place.row)
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
            "the data file is of an unknown kind", where=file, expected=f"{_KNOWN_KINDS}, or a datasets folder"
        )


def _rows_of_file(file: str) -> Iterator[dict[str, Any] | BadRow]:
    """All rows of a file, without their places."""
    return (row for _, _, row in _read(file, _START, file))


def _saved_parts(folder: str) -> list[str]:
    """The Arrow files of a datasets folder, in their order; none where it is no such folder."""
    filesystem, inner = file_system(folder)
    inner = inner.rstrip("/")
    try:
        state = json.loads(patiently(folder, lambda: filesystem.cat_file(f"{inner}/{_SAVED}")))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [filesystem.unstrip_protocol(f"{inner}/{part['filename']}") for part in state["_data_files"]]
