"""The store publishes whole results or none, and never hands out a damaged one."""

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.store import Store, default_root, manifest_digest
from posttrain_lib.schema.manifests import StepManifest


def manifest(step: str = "prepare", key: str = "k1") -> StepManifest:
    return StepManifest(step, 1, key, {"config": "c"}, {}, {}, {}, (), {}, {}, {}, "2026-01-01T00:00:00", 0.1)


def publish(store: Store, key: str = "k1", text: str = "content") -> Path:
    with store.scratch() as folder:
        (folder / "data.txt").write_text(text)
        store.publish(folder, manifest(key=key))
    return store.result_folder("prepare", key)


def test_publish_then_find(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = publish(store)
    found = store.find("prepare", "k1")
    assert found == dataclasses.replace(manifest(), digest=manifest_digest(manifest()))
    assert (folder / "data.txt").read_text() == "content"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.scratch() as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("stopped in the middle")
    assert store.find("prepare", "k1") is None
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_result_is_set_aside_and_said(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    path = publish(store) / "data.txt"
    path.write_text("") if damage == "truncate" else path.unlink()
    assert store.find("prepare", "k1") is None
    assert "data.txt" in capsys.readouterr().out
    publish(store, text="content")
    assert store.find("prepare", "k1") is not None


def test_a_folder_without_manifest_is_no_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.result_folder("prepare", "k1").mkdir(parents=True)
    assert store.find("prepare", "k1") is None


def _hold(root: Path, entered: "multiprocessing.synchronize.Event") -> None:
    with Store(root).lock("prepare", "k1"):
        entered.set()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, entered))
    holder.start()
    assert entered.wait(30)
    said: list[str] = []
    os.kill(holder.pid, 0)
    holder.kill()
    holder.join()
    with Store(tmp_path).lock("prepare", "k1", said.append):
        pass
    assert said == []


def _hold_until(
    root: Path, entered: "multiprocessing.synchronize.Event", go: "multiprocessing.synchronize.Event"
) -> None:
    with Store(root).lock("prepare", "k1"):
        entered.set()
        go.wait(30)


def test_equal_work_waits_and_says_for_whom(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, go = context.Event(), context.Event()
    holder = context.Process(target=_hold_until, args=(tmp_path, entered, go))
    holder.start()
    assert entered.wait(30)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        go.set()

    with Store(tmp_path).lock("prepare", "k1", say):
        pass
    holder.join()
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]


def test_entries_and_removal(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, key="k1")
    publish(store, key="k2", text="more")
    store.work_folder("train", "k3").mkdir(parents=True)
    assert {(entry.kind, entry.key) for entry in store.entries()} == {("steps", "k1"), ("steps", "k2"), ("work", "k3")}
    victim = next(entry for entry in store.entries() if entry.key == "k1")
    assert store.remove(victim)
    assert store.find("prepare", "k1") is None
    assert store.find("prepare", "k2") is not None


def test_what_a_running_step_holds_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    context = multiprocessing.get_context("fork")
    entered, go = context.Event(), context.Event()
    holder = context.Process(target=_hold_until, args=(tmp_path, entered, go))
    holder.start()
    assert entered.wait(30)
    assert not store.remove(store.entries()[0])
    go.set()
    holder.join()
    assert store.remove(store.entries()[0])


def test_a_store_in_a_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"), Store(tmp_path / "file").scratch():
        pass


def test_remote_roots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_STORE", "s3://bucket/store")
    with pytest.raises(StoreError, match="local folder"):
        default_root()


def test_files_json_lists_sizes(tmp_path: Path) -> None:
    folder = publish(Store(tmp_path))
    assert json.loads((folder / "files.json").read_text()) == {"data.txt": 7}
