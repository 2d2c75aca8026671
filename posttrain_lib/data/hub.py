"""Data sets on the Hugging Face hub by their id: which commit is meant, and its rows as they are streamed."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from posttrain_lib.data import readers
from posttrain_lib.data.remote import is_transient, patiently
from posttrain_lib.errors import DataError

HUB_FORM = "hf://owner/name[@revision][?config=main&split=train_sft]"
_HUB = "hf://"
#: what fsspec itself resolves on the hub: single files
_FILES = "hf://datasets/"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_JSON_FILE = re.compile(r"\.(json|jsonl|ndjson)(\.gz|\.zst)?$")

Row = dict[str, Any] | readers.BadRow
#: address of a file -> its rows
ReadJson = Callable[[str], Iterator[Row]]


def is_hub_id(path: str) -> bool:
    """Whether the path names a data set on the hub, not a file there or elsewhere."""
    return path.startswith(_HUB) and not path.startswith(_FILES)


@dataclass(frozen=True)
class HubId:
    """A hub id, taken apart."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, hub_id: str) -> HubId:
        """Inverse of ``str``."""
        address, asks, query = hub_id.removeprefix(_HUB).partition("?")
        name, at, revision = address.partition("@")
        options: dict[str, str] = {}
        for option in query.split("&") if asks else []:
            key, _, value = option.partition("=")
            if key not in ("config", "split") or key in options or not value:
                raise _malformed(hub_id, f"?{query}")
            options[key] = unquote(value)
        if not _NAME.fullmatch(name) or (at and not revision):
            raise _malformed(hub_id, hub_id)
        return cls(name, revision or None, **options)

    def __str__(self) -> str:
        return f"{_HUB}{self.name}" + (f"@{self.version}" if self.revision else self._query)

    @property
    def version(self) -> str:
        """Which rows of the data set are meant."""
        return f"{self.revision}{self._query}"

    @property
    def _query(self) -> str:
        options = {"config": self.config, "split": self.split}
        named = [f"{key}={quote(value, safe='[]:+')}" for key, value in options.items() if value is not None]
        return "?" + "&".join(named) if named else ""

    def at_commit(self) -> HubId:
        """The same rows tomorrow: a branch or a tag moves, so the commit it stands at now."""
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self
        return replace(self, revision=self._commit())

    def rows(self, first: int, read_json: ReadJson) -> Iterator[Row]:
        """Rows from number ``first`` on, all of one commit.

        A broken line ends a stream of ``datasets`` for good; so JSON files are taken from it by their names alone, and
        read by ``read_json``, which gives a BadRow in such a place.

        ``datasets`` itself waits for minutes where a byte range fails. What it does not wait for (opening, and answers
        like 503 that last longer than some seconds) is waited out here, and read on after the last row given.
        """
        at = replace(self, revision=self._commit())
        given, stream = 0, None

        def advance() -> Row | None:
            nonlocal stream
            stream = at._stream(first + given, read_json) if stream is None else stream
            try:
                return next(stream, None)
            except ConnectionError as error:  # of datasets, after all its attempts: more of the same would take hours
                raise DataError(
                    "the data cannot be read: the hub kept failing",
                    where=self,
                    got=f"{type(error).__name__}: {error}, row {first + given + 1}, last {error.__cause__!r}",
                    fix="run again when the hub answers; what was finished is reused",
                ) from error
            except Exception:
                stream = None
                raise

        while (row := patiently(str(self), advance)) is not None:
            given += 1
            yield row

    def _stream(self, first: int, read_json: ReadJson) -> Iterator[Row]:
        import datasets

        # Where the hub fails, datasets takes what it finds in its cache, whatever commit that is of: an empty one. And
        # by the bare name it would take a folder of the working directory.
        with tempfile.TemporaryDirectory() as empty:
            try:
                builder = datasets.load_dataset_builder(
                    f"{_FILES}{self.name}", self.config, revision=self.revision, cache_dir=empty
                )
                if files := _plain_json(builder, self.split or "train"):
                    return itertools.islice(itertools.chain.from_iterable(map(read_json, files)), first, None)
                stream = builder.as_streaming_dataset(split=self.split or "train")
            except FileNotFoundError as error:  # what datasets makes of every fault, too
                if fault := _fault_behind(error):
                    raise ConnectionError(f"{type(fault).__name__}: {fault}") from error
                raise
        return readers.without_nulls(iter(stream.skip(first)))

    def _commit(self) -> str:
        """The commit of the revision, by the hub.

        Raises:
            DataError: the hub does not answer, or lets nobody read the files with this token.
        """
        import huggingface_hub

        if huggingface_hub.is_offline_mode():
            raise DataError(
                "the data set is on the hub, which is switched off",
                where=self,
                got="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
                fix="unset it, or name files on disk",
            )
        api = huggingface_hub.HfApi()

        def ask() -> str:
            told = api.dataset_info(self.name, revision=self.revision)
            api.auth_check(self.name, repo_type="dataset")  # of a gated one the hub tells everything but the rows
            return str(told.sha)

        try:
            return patiently(str(self), ask)
        except huggingface_hub.errors.HfHubHTTPError as error:
            if refusal := self._refusal(error):
                raise refusal from error
            raise

    def _refusal(self, error: Exception) -> DataError | None:
        """What the hub's refusal means for the id; None where it means nothing known."""
        from huggingface_hub import errors

        if isinstance(error, errors.RevisionNotFoundError):
            return DataError(
                "the data set has no such revision",
                where=self,
                got=self.revision,
                expected="a branch, a tag, a whole commit or refs/pr/<number>",
                fix="look the revision up on the data set's page",
            )
        if isinstance(error, errors.GatedRepoError):
            return DataError(
                "the data set is gated, and the token gives no access" if _has_token() else "the data set is gated",
                where=self,
                fix="ask for access on the data set's page, then set HF_TOKEN to a token of that account",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return DataError(
                "the hub has no such data set, or it is private",
                where=self,
                got=self.name,
                expected=HUB_FORM,
                fix="check owner and name; for a private one, set HF_TOKEN to a token that may read it",
            )
        return None


def _plain_json(builder: Any, split: str) -> list[str]:
    """Addresses of the files of a split that are JSON and nothing but their rows; none where ``datasets`` itself has
    to make rows of them, as the data set's README may ask, or where the split is none of the named ones."""
    config = builder.config
    if builder.name != "json" or config.field is not None or builder.info.features is not None:
        return []
    files = [str(file) for file in (config.data_files or {}).get(split, [])]
    return files if all(file.startswith(_FILES) and _JSON_FILE.search(file) for file in files) else []


def _fault_behind(error: BaseException) -> BaseException | None:
    """The passing fault that the error was raised for, or while it was handled."""
    fault: BaseException | None = error
    while fault is not None and not is_transient(fault):
        fault = fault.__cause__ or fault.__context__
    return fault


def _has_token() -> bool:
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def _malformed(hub_id: str, got: str) -> DataError:
    return DataError("the hub id is malformed", where=hub_id, got=got, expected=HUB_FORM, fix="write it in that form")
