"""Tokenising on the fly from an object store: faults change nothing, and what is consumed is not read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data import remote
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.fingerprint import fingerprint
from posttrain_lib.data.live_feed import LiveFeed, LiveSpec
from posttrain_lib.data.loader import LoadedStep, PackedLoader
from posttrain_lib.data.sources import list_files
from posttrain_lib.errors import CheckpointError, DataError
from posttrain_lib.lineage.digests import FileDigests
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.s3 import s3_client, s3_environment, s3_server

SHARDS, ROWS = 6, 60
ROW_TOKENS = 192


def _shard(number: int) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Row {row} of shard {number}?"},
                {"role": "assistant", "content": "so " * (1 + (row * 5 + number) % 17)},
            ]
        }
        for row in range(ROWS)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[FaultyProxy, Any]]:
    with s3_server() as url, faulty_proxy(url) as proxy, s3_environment(proxy.url):
        client = s3_client(url)
        client.mkdir("live")
        for number in range(SHARDS):
            client.pipe(f"live/shard-{number}.jsonl", _shard(number))
        yield proxy, client


@pytest.fixture
def proxy(store: tuple[FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    monkeypatch.setattr(
        remote, "PATIENCE", remote.Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02)
    )
    for name, value in {"FIRST_RANGE": 1 << 10, "FIRST_AHEAD": 1 << 10, "LARGEST_AHEAD": 1 << 11}.items():
        monkeypatch.setattr(remote, f"_{name}", value)
    store[0].reset()
    return store[0]


def _loader(tokenizer: Path) -> PackedLoader:
    path = "s3://live/*.jsonl"
    config = DataConfig.model_validate({"sources": [{"name": "s3", "path": path}], "held_out": {"fraction": 0.05}})
    files = (tuple(list_files(path, FileDigests())),)
    spec = LiveSpec(config, str(tokenizer), files, fingerprint(ChatTokenizer(tokenizer)))
    feed = LiveFeed(spec, row_tokens=ROW_TOKENS, window=32, seed=1)
    return PackedLoader(feed, row_tokens=ROW_TOKENS, rows_per_step=2, packing_buffer=8, background=False)


def _tokens(steps: list[LoadedStep]) -> list[bytes]:
    return [batch.token_ids.tobytes() for step in steps for batch in step.micro_batches]


def _take(loader: PackedLoader, steps: int) -> list[LoadedStep]:
    with loader:
        return [step for _ in range(steps) if (step := loader.next_step()) is not None]


def test_faults_on_the_way_change_nothing(proxy: FaultyProxy, chatml_folder: Path) -> None:
    whole = _tokens(_take(_loader(chatml_folder), 30))
    proxy.faults += [
        Fault(2, status=503),
        Fault(3, after_bytes=300),
        Fault(1, status=500, key="shard-2"),
        Fault(2, after_bytes=0, key="shard-4"),
    ]
    assert _tokens(_take(_loader(chatml_folder), 30)) == whole
    assert all(fault.times == 0 for fault in proxy.faults)


def test_what_keeps_failing_is_named(proxy: FaultyProxy, chatml_folder: Path) -> None:
    proxy.faults.append(Fault(10**6, status=503, key="shard-3"))
    with pytest.raises(DataError, match=r"shard-3\.jsonl"):
        _take(_loader(chatml_folder), 300)


def test_a_resumed_run_does_not_read_consumed_shards_again(proxy: FaultyProxy, chatml_folder: Path) -> None:
    whole = _tokens(_take(_loader(chatml_folder), 45))
    proxy.reset()
    first = _loader(chatml_folder)
    taken = _tokens(_take(first, 40))
    read_before = {number for number in range(SHARDS) if proxy.ranges(f"shard-{number}")}
    assert len(read_before) >= 4
    proxy.reset()
    again = _loader(chatml_folder)
    again.load_state(json.loads(json.dumps(first.state())))
    assert taken + _tokens(_take(again, 5)) == whole
    # The packer waits for rows of the last windows (of 32 rows, half a shard) only: what lay before is through.
    consumed = [number for number in read_before if not proxy.ranges(f"shard-{number}")]
    assert len(consumed) >= 2


def test_an_object_that_was_replaced_is_named_on_resume(
    store: tuple[FaultyProxy, Any], proxy: FaultyProxy, chatml_folder: Path
) -> None:
    first = _loader(chatml_folder)
    _take(first, 2)
    try:
        store[1].pipe("live/shard-5.jsonl", _shard(77))
        with pytest.raises(CheckpointError, match=r"shard-5\.jsonl"):
            _loader(chatml_folder).load_state(first.state())
    finally:
        store[1].pipe("live/shard-5.jsonl", _shard(5))
