"""A preparation that is killed before any of its file operations: the next one gives what an undisturbed one gives, and
nothing that a killed one left is taken for a result."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.prepare import QUARANTINE
from posttrain_lib.data.sources import digest_rows
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import prepare_data
from steps.base import content_key, run_step

#: what Python tells its audit hooks of before it does it; fsync is told by this test
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.copyfile", "fcntl.flock"}
CONFIG: dict[str, Any] = {
    "name": "test",
    "data": {"max_example_tokens": 64, "held_out": {"fraction": 0.3}, "workers": 0},
    "model": {"path": "folder"},
    "train": {"steps": 10, "row_tokens": 64},
}


class Preparation:
    """Rows and a tokenizer in a folder; the step on them, each time in a process of its own."""

    def __init__(self, folder: Path, broken: int) -> None:
        rows = [
            {"messages": [{"role": "user", "content": f"How is {n}?"}, {"role": "assistant", "content": "Fine."}]}
            for n in range(40)
        ]
        path, tokenizer = folder / "rows.jsonl", folder / "tokenizer"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{broken\n" * broken)
        build_tokenizer(["How is it? Fine."], 300, tokenizer)
        data = {**CONFIG["data"], "sources": [{"name": "a", "path": str(path)}]}
        self.config = build_run_config({**CONFIG, "data": data})
        self.inputs = {
            "source:a": ArtifactRef(str(path), "rows", digest_rows(str(path), FileDigests())),
            "tokenizer": ArtifactRef(str(tokenizer), "tokenizer", FileDigests().path(tokenizer)),
        }
        made = StepManifest("inputs", 1, "k", {}, {}, {}, self.inputs, (), {}, {}, {}, "2026-01-01T00:00:00", 0.1)
        self.manifests, self.store = {"inputs": made}, Store(folder / "store")
        self.key = content_key(prepare_data.STEP, self.config, self.inputs)[0]
        self.folder = self.store.result_folder("prepare_data", self.key)
        ChatTokenizer(tokenizer)  # imports all that the processes need: they are forked from this one

    def run(self, kill_before: int = 0) -> int:
        """Number of file operations; the process is killed before that one."""
        context = multiprocessing.get_context("fork")
        count = context.Value("i", 0)
        process = context.Process(target=self._run, args=(count, kill_before))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_before else 0)
        return count.value

    def _run(self, count: Any, kill_before: int) -> None:
        def before(event: str, arguments: tuple[Any, ...]) -> None:
            opened = event == "open" and str(self.store.root) in str(arguments[0]) and arguments[2] & os.O_CREAT
            if opened or event in CHANGES or event == "fsync":
                count.value += 1
                if count.value == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sync = os.fsync
        os.fsync = lambda handle: (before("fsync", ()), sync(handle))[1]
        sys.addaudithook(before)  # for good: this process ends with this function
        try:
            run_step(prepare_data.STEP, self.config, self.manifests, store=self.store, say=lambda text: None)
        except DataError:
            assert not self.folder.exists()

    def result(self) -> dict[str, str]:
        """Name -> digest of every output; empty where none stands."""
        found = self.store.find("prepare_data", self.key)
        return {} if found is None else {name: FileDigests().path(Path(ref.uri)) for name, ref in found.outputs.items()}

    def quarantine(self) -> list[str]:
        """Rows that a preparation refused which stopped for that."""
        path = self.store.work_folder("prepare_data", self.key) / QUARANTINE
        return [json.loads(line)["row_id"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(8))
def test_the_next_one_gives_what_an_undisturbed_one_gives(tmp_path: Path, isolated_store: Path, turn: int) -> None:
    preparation = Preparation(tmp_path, broken=0)
    operations = preparation.run()
    whole = preparation.result()
    assert operations > 40 and len(whole) == 7
    for number in range(1 + turn, operations + 1, 8):
        shutil.rmtree(preparation.store.root)
        preparation.run(kill_before=number)
        assert preparation.result() in ({}, whole)
        preparation.run()
        assert preparation.result() == whole, number
        TokenStore(preparation.folder / "train").verify()
        for entry in preparation.store.entries():  # nobody holds what the killed one left
            assert preparation.store.remove(entry)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(8))
def test_what_was_refused_is_there_whole_or_not_at_all(tmp_path: Path, isolated_store: Path, turn: int) -> None:
    preparation = Preparation(tmp_path, broken=5)
    operations = preparation.run()
    refused = preparation.quarantine()
    assert refused == [f"rows.jsonl:{number}" for number in range(41, 46)]
    for number in range(1 + turn, operations + 1, 8):
        shutil.rmtree(preparation.store.root)
        preparation.run(kill_before=number)
        assert preparation.result() == {} and preparation.quarantine() in ([], refused)
        preparation.run()
        assert preparation.quarantine() == refused, number
