"""Checkpoints in an object store: files first, the manifest last, through everything that stores do."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint import state_files, state_remote
from posttrain_lib.checkpoint.manager import CheckpointManager, fetch_checkpoint, load_model_state
from posttrain_lib.data import remote
from posttrain_lib.errors import CheckpointError
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.s3 import s3_client, s3_environment, s3_server
from tests.unit.checkpoint.test_manager import make_state, tensors_of

#: the least that S3 takes as a part of a file but its last
PART = 5 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FaultyProxy, Any]]:
    """A proxy before an S3 server, and a client that goes round the proxy."""
    with s3_server() as url, faulty_proxy(url) as proxy, s3_environment(proxy.url):
        client = s3_client(url)
        client.mkdir("runs")
        yield proxy, client


@pytest.fixture
def store(server: tuple[FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[str, FaultyProxy, Any]:
    """(URL of an empty folder, proxy, client); retries are as many as ever, and wait for milliseconds."""
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(first_wait_seconds=0.001, longest_wait_seconds=0.01))
    server[0].reset()
    return f"s3://runs/{uuid.uuid4().hex}", *server


def files(client: Any, url: str) -> list[str]:
    client.invalidate_cache()
    return sorted(path.partition("/step-")[2] for path in client.find(url))


def test_what_is_saved_comes_back(store: tuple[str, FaultyProxy, Any], tmp_path: Path) -> None:
    url, proxy, client = store
    manager = CheckpointManager(url, 1, keep_every_steps=2, asynchronous=True)
    for step in range(1, 4):
        state = make_state(step)
        path = manager.save(state, wait=step == 3)
    assert path == f"{url}/step-00000003"
    whole = ["manifest.json", "rng-0.json", "state.json", "tensors-0.bin", "tensors-0.json"]
    assert files(client, url) == [f"0000000{step}/{file}" for step in (2, 3) for file in whole]
    written = [
        seen.key.rpartition("/")[2] for seen in proxy.seen if seen.method == "PUT" and "step-00000003" in seen.key
    ]
    assert written[-1] == "manifest.json"
    assert written.count("manifest.json") == 1
    other = make_state()
    assert manager.resume(other) == path
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))
    assert (other.progress.step, other.loader.value) == (3, 3)
    fetched = fetch_checkpoint(path, tmp_path / "here")
    assert fetched == tmp_path / "here/step-00000003"
    for weights in (load_model_state(path), load_model_state(fetched)):
        assert all(torch.equal(weights[name], value) for name, value in state.model.state_dict().items())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(2, status=503, method="PUT"),
        Fault(1, status=500, method="PUT", key="manifest.json"),
        Fault(1, method="PUT", key="manifest.json"),
        Fault(1, method="PUT", key="tensors-0.bin"),
        Fault(2, status=503, method="POST"),
        Fault(1, method="POST", key="?uploads"),
        Fault(1, method="POST", key="?uploadId"),
        Fault(2, status=503, method="DELETE"),
        Fault(1, method="DELETE"),
    ],
    ids=lambda fault: f"{fault.method} {fault.status or 'answer lost'} {fault.key}",
)
def test_faults_are_outlasted(
    store: tuple[str, FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """A file of 3 parts (12 MB), through faults of every kind of request that a save makes."""
    monkeypatch.setattr(state_remote, "WRITE_BYTES", PART)
    url, proxy, _ = store
    manager = CheckpointManager(url, 1)
    manager.save(make_state(1))
    proxy.faults.append(fault)
    state = make_state(2, size=1024)
    path = manager.save(state)
    assert fault.times == 0, "the fault has happened"
    other = make_state(size=1024)
    assert manager.resume(other) == path
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))


@pytest.mark.parametrize("key", ["tensors-0.bin", "state.json", "manifest.json"])
def test_a_store_that_refuses_leaves_what_was_there(store: tuple[str, FaultyProxy, Any], key: str) -> None:
    url, proxy, client = store
    manager, state = CheckpointManager(url, 2, asynchronous=True), make_state(1)
    good = manager.save(state, wait=True)
    before = files(client, url)
    proxy.faults.append(Fault(1000, status=403, method="PUT", key=key))
    state.progress.step = 2
    manager.save(state)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        manager.wait()
    assert "rank 0" in str(caught.value.got)
    assert files(client, url) == before
    proxy.reset()
    assert manager.newest() == good
    assert manager.save(state, wait=True) == f"{url}/step-00000002"


def test_what_was_never_published_is_not_taken_and_goes(store: tuple[str, FaultyProxy, Any]) -> None:
    url, _, client = store
    manager = CheckpointManager(url, 2)
    good = manager.save(make_state(1))
    later = manager.save(make_state(2))
    client.rm_file(f"{later}/manifest.json".removeprefix("s3://"))
    said: list[str] = []
    assert CheckpointManager(url, 2, say=said.append).resume(make_state()) == good
    assert not said
    assert {name[:8] for name in files(client, url)} == {"00000001"}


def test_other_stores_are_written_as_streams() -> None:
    url = f"memory://runs/{uuid.uuid4().hex}"
    manager, state = CheckpointManager(url, 1), make_state(1, size=1024)
    assert sum(value.nbytes for value in tensors_of(state)) > state_files.WRITE_BYTES, "several blocks"
    path = manager.save(state)
    other = make_state(size=1024)
    assert manager.resume(other) == path
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))
