"""The store publishes whole results or none, and never hands out a damaged one."""

import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.store import Store, check_manifest, default_root, manifest_digest
from posttrain_lib.schema.manifests import MadeBy, StepManifest


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


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("truncate", "data.txt"),
        ("truncate", "files.json"),
        ("remove", "data.txt"),
        ("remove", "files.json"),
        ("remove", "manifest.json"),
    ],
)
def test_a_damaged_result_is_set_aside_and_said(
    tmp_path: Path, damage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a removal that was killed leaves it, whatever went first."""
    store = Store(tmp_path)
    path = publish(store) / name
    path.write_text("") if damage == "truncate" else path.unlink()
    assert store.find("prepare", "k1") is None
    assert name in capsys.readouterr().out
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


def edit(folder: Path, **values: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


@pytest.mark.parametrize(
    "change", [{"seconds": 0.2}, {"config": {"seed": 7}}, {"digest": ""}, {"digest": "0" * 64}, {"made_by": None}]
)
def test_a_manifest_edited_by_hand_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    store = Store(tmp_path)
    with store.scratch() as folder:
        made_by = MadeBy("SFTFlow", "1", "prepare", "tester")
        store.publish(folder, dataclasses.replace(manifest(), made_by=made_by))
    path = edit(store.result_folder("prepare", "k1"), **change)
    with pytest.raises(StoreError, match="changed after it was published") as caught:
        store.find("prepare", "k1")
    assert caught.value.where == str(path) and "prepare makes it again" in str(caught.value.fix)


def test_a_manifest_written_anew_with_equal_content_is_no_edit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.scratch() as folder:
        odd = {"nan": float("nan"), "numbers": {2: "two", 10: "ten"}, "pair": (1, 2), "word": "é"}
        published = store.publish(folder, dataclasses.replace(manifest(), metrics=odd))
    edit(store.result_folder("prepare", "k1"), reused=True)
    found = store.find("prepare", "k1")
    assert (
        found is not None and found.digest == published.digest and found.metrics["numbers"] == {"2": "two", "10": "ten"}
    )
    check_manifest(dataclasses.replace(published, reused=True), "memory")


def test_manifests_of_format_1_are_read(tmp_path: Path) -> None:
    """As they were written: without hardware, made_by and digest; cpu, cores and machine among the environment."""
    store = Store(tmp_path)
    folder = publish(store)
    raw = json.loads((folder / "manifest.json").read_text())
    for name in ("hardware", "made_by", "digest"):
        del raw[name]
    raw |= {"format_version": 1, "environment": {"cpu": "c", "cores": "2", "machine": "m", "python": "3.11"}}
    (folder / "manifest.json").write_text(json.dumps(raw))
    found = store.find("prepare", "k1")
    assert found is not None and (found.made_by, found.digest) == (None, "")
    assert found.hardware == {"cpu": "c", "cores": "2", "machine": "m"} and found.environment == {"python": "3.11"}
    assert StepManifest.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read")]
)
def test_what_is_no_manifest_is_named(tmp_path: Path, text: str, said: str) -> None:
    store = Store(tmp_path)
    (publish(store) / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        store.find("prepare", "k1")


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    edit(publish(store), format_version=99)
    with pytest.raises(StoreError, match="newer version of this project"):
        store.find("prepare", "k1")


def test_a_result_that_is_read_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    (entry,) = store.entries()
    with store.reading([("prepare", "k1")]), store.reading([("prepare", "k1")]), store.lock("prepare", "k1"):
        assert not store.remove(entry)
    with store.reading([("prepare", "k1")]):
        assert not store.remove(entry)
    assert store.remove(entry)


def test_a_result_used_since_it_was_listed_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = publish(store)
    os.utime(folder / "manifest.json", (1, 1))
    (entry,) = store.entries()
    assert store.find("prepare", "k1") is not None
    assert not store.remove(entry)
    assert store.remove(dataclasses.replace(entry, used_at=time.time()))


def test_what_a_step_writes_and_its_work_stay(tmp_path: Path) -> None:
    """However old they are; both go when nobody holds them any more."""
    store = Store(tmp_path)
    work = store.work_folder("train", "w1")
    work.mkdir(parents=True)
    with store.scratch() as folder, store.lock("train-work", "w1"):
        entries = store.entries()
        assert {entry.kind for entry in entries} == {"tmp", "work"}
        assert not any(store.remove(entry) for entry in entries)
        assert folder.is_dir() and work.is_dir()
    (left,) = store.entries()
    assert store.remove(left) and not work.exists()
    assert not list((tmp_path / "tmp").iterdir()) and not list((tmp_path / "locks").glob("tmp-*"))


def test_interrupted_work_is_as_young_as_what_was_last_written_in_it(tmp_path: Path) -> None:
    """Training writes checkpoints for days into folders below the one that it made when it began."""
    store = Store(tmp_path)
    work = store.work_folder("train", "w1")
    (work / "checkpoints" / "step-10").mkdir(parents=True)
    (work / "checkpoints" / "step-10" / "weights").write_text("new")
    for folder in (work, work / "checkpoints", work / "checkpoints" / "step-10"):
        os.utime(folder, (1, 1))
    (entry,) = store.entries()
    assert entry.used_at > time.time() - 3600
    assert not store.remove(dataclasses.replace(entry, used_at=1.0))


@pytest.mark.parametrize("looks", [1, 2])
def test_files_that_vanish_while_the_store_is_listed_count_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """A running step removes checkpoints and publishes results at any moment: before any look at a file."""
    store = Store(tmp_path)
    work = store.work_folder("train", "w1")
    work.mkdir(parents=True)
    (work / "kept").write_text("12")
    (work / "gone").write_text("1234")
    real, looked = Path.stat, []

    def stat(path: Path, **options: bool) -> os.stat_result:
        looked.extend([path] if path == work / "gone" else [])
        if len(looked) == looks:
            (work / "gone").unlink(missing_ok=True)
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    (entry,) = store.entries()
    assert entry.size_bytes == (2 if len(looked) == looks else 6)


@pytest.mark.parametrize("flow", [None, "SFTFlow"])
def test_results_that_vanish_while_the_newest_is_looked_for_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: str | None
) -> None:
    """It is asked for to say what changed since: no reason for a run to fail."""
    store = Store(tmp_path)
    kept, gone = publish(store, key="k1"), publish(store, key="k2")
    os.utime(kept / "manifest.json", (1, 1))
    read = Path.read_text

    def read_text(path: Path, **options: str) -> str:
        shutil.rmtree(gone, ignore_errors=True)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    found = store.newest("prepare", flow)
    assert found is not None and found.key == "k1"


def test_what_one_clean_up_is_removing_another_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, others = Store(tmp_path), []
    os.utime(publish(store) / "manifest.json", (1, 1))
    real = shutil.rmtree

    def rmtree(folder: Path, **options: bool) -> None:
        if folder.parent.name == "tmp" and folder.is_dir():
            others.extend(store.remove(entry) for entry in store.entries())
        real(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (entry,) = store.entries()
    assert store.remove(entry)
    assert others == [False] and not list((tmp_path / "tmp").iterdir())


def _remove_without_room(root: Path) -> None:
    make = os.mkdir

    def mkdir(path: Path, *arguments: int) -> None:
        if not os.path.isdir(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *arguments)

    os.mkdir = mkdir  # type: ignore[assignment] - this process ends with this function
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    store = Store(root)
    assert all(store.remove(entry) for entry in store.entries())


def test_the_clean_up_makes_room_where_there_is_none(tmp_path: Path) -> None:
    """Not for one byte, nor for a folder, which takes a block of a disk."""
    store = Store(tmp_path)
    publish(store)
    store.work_folder("train", "w1").mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=_remove_without_room, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0 and not store.entries()


def test_what_a_killed_step_was_writing_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    writer = context.Process(target=_write, args=(tmp_path, entered))
    writer.start()
    assert entered.wait(30)
    (entry,) = store.entries()
    assert not store.remove(entry)
    writer.kill()
    writer.join()
    assert store.remove(entry) and not store.entries()


def _write(root: Path, entered: "multiprocessing.synchronize.Event") -> None:
    with Store(root).scratch():
        entered.set()
        time.sleep(60)
