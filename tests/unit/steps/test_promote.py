"""``python -m steps.promote``: versions count up, what failed is refused, what was promoted is not cleaned away."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError, ModelError, StoreError, VerificationError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.store import MANIFEST, Store
from steps.promote import listing, main, promote, rollback
from steps.store import clean
from tests.support.exported import folder_of, publish_run


def test_versions_count_up_and_none_is_changed(isolated_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFLOW_USER", "ann")
    folder = folder_of(publish_run())
    first = promote(Store(), "mine", str(folder), note="the first")
    path = isolated_store / "models" / "mine" / "1.json"
    before = path.read_bytes()
    second = promote(Store(), "mine", str(folder.parent))  # the published result that the folder stands in
    assert (first.label, second.label) == ("mine@1", "mine@2")
    assert path.read_bytes() == before
    raw = json.loads(before)
    assert raw["user"] == "ann" and raw["note"] == "the first" and raw["step"] == "export"
    assert raw["checks"] == [{"name": "logits agree", "passed": True, "value": 0.5, "limit": 1.0, "reason": ""}]
    assert raw["files"] == {"config.json": (folder / "config.json").stat().st_size, "model.safetensors": 7}
    assert raw["key"] == folder.parent.name
    assert promoted.versions_of(Store(), "mine") == [first, second]


def test_an_export_whose_checks_failed_needs_a_reason(isolated_store: Path) -> None:
    folder = folder_of(publish_run(proven=False))
    with pytest.raises(VerificationError, match="check 'logits agree' failed"):
        promote(Store(), "mine", str(folder))
    assert not promoted.all_promoted(Store())
    entry = promote(Store(), "mine", str(folder), force="for a comparison")
    assert entry.forced == "for a comparison (check 'logits agree' failed)"
    assert "forced: for a comparison" in listing(Store())


def test_a_forced_one_needs_a_reason_under_another_name_too(isolated_store: Path) -> None:
    promote(Store(), "mine", str(folder_of(publish_run(proven=False))), force="for a comparison")
    with pytest.raises(VerificationError, match="logits agree"):
        promote(Store(), "yours", "models/mine")


def test_a_reason_for_what_needs_none_is_not_recorded(isolated_store: Path) -> None:
    assert promote(Store(), "mine", str(folder_of(publish_run())), force="just so").forced is None


def test_a_promoted_model_under_another_name(isolated_store: Path) -> None:
    first = promote(Store(), "mine", str(folder_of(publish_run())))
    second = promote(Store(), "served", "models/mine@1")
    assert second.label == "served@1"
    assert (second.path, second.digest, second.key, second.checks) == (
        first.path,
        first.digest,
        first.key,
        first.checks,
    )


def test_a_folder_that_no_run_made(isolated_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        promote(Store(), "mine", str(folder))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    entry = promote(Store(), "mine", str(folder))
    assert entry.path == str(folder) and entry.key is None and entry.checks == ()
    assert "a folder" in listing(Store())


@pytest.mark.parametrize("name", ["", "a/b", "..", "a@1", "-a"])
def test_names_that_no_file_could_have(isolated_store: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a model"):
        promote(Store(), name, str(folder_of(publish_run())))


def test_an_entry_that_cannot_be_read_is_named(isolated_store: Path) -> None:
    promote(Store(), "mine", str(folder_of(publish_run())))
    path = isolated_store / "models" / "mine" / "1.json"
    path.write_text("{")
    with pytest.raises(StoreError, match=r"1\.json"):
        promoted.find(Store(), "mine", None, where="model.path")


def test_the_clean_up_leaves_what_was_promoted(isolated_store: Path) -> None:
    kept, other = folder_of(publish_run()), folder_of(publish_run(words="other"))
    promote(Store(), "mine", str(kept))
    then = time.time() - 30 * 86_400
    for folder in isolated_store.glob("steps/*/*"):
        os.utime(folder / MANIFEST, (then, then))
    said = clean(Store(), older_than_days=7, dry_run=False, tagged=[])
    assert kept.is_dir() and not other.exists()
    assert "kept (for models/mine@1) steps/export" in said


def change_a_byte(folder: Path) -> None:
    """Of the weights, behind their size and time."""
    path = folder / "model.safetensors"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def folders(isolated_store: Path) -> list[Path]:
    """Of versions 1, 2 and 3, the current one."""
    found = [folder_of(publish_run(words=words)) for words in ("one", "two", "three")]
    for folder in found:
        promote(Store(), "mine", str(folder))
    return found


def test_a_rollback_reads_the_folder_before_it_moves_the_pointer(folders: list[Path], isolated_store: Path) -> None:
    change_a_byte(folders[0])
    before = (isolated_store / "models" / "mine" / "pointer.json").read_bytes()
    with pytest.raises(ModelError, match="folder of version 1 is not what was promoted") as caught:
        rollback(Store(), "mine", 1, note="answers got worse")
    assert str(folders[0]) in str(caught.value) and "another version (2)" in str(caught.value)
    assert (isolated_store / "models" / "mine" / "pointer.json").read_bytes() == before
    shutil.rmtree(folders[1])
    with pytest.raises(ModelError, match="the folder is gone") as caught:
        rollback(Store(), "mine", 2, note="answers got worse")
    assert "another version (1)" in str(caught.value)  # its files have their sizes; a rollback to it reads them


@pytest.mark.parametrize("source", ["models/mine@1", "the folder", "the result"])
def test_a_changed_folder_is_not_promoted_whatever_names_it(folders: list[Path], source: str) -> None:
    change_a_byte(folders[0])
    names = {"the folder": str(folders[0]), "the result": str(folders[0].parent)}
    with pytest.raises(ModelError, match="changed after it was published") as caught:
        promote(Store(), "other", names.get(source, source))
    assert str(folders[0]) in str(caught.value) and not promoted.versions_of(Store(), "other")


def test_the_digest_of_a_folder_that_no_run_made_is_read_each_time(isolated_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_text("weights")
    first = promote(Store(), "mine", str(folder))
    change_a_byte(folder)
    assert promote(Store(), "mine", str(folder)).digest != first.digest


def test_the_fix_of_a_pointer_changed_by_hand_works(folders: list[Path], isolated_store: Path) -> None:
    path = isolated_store / "models" / "mine" / "pointer.json"
    path.write_text(path.read_text().replace('"current": 3', '"current": 1'))
    with pytest.raises(StoreError, match="--rollback 1 --note WHY"):
        promoted.find(Store(), "mine", None, where="model.path")
    assert promoted.find(Store(), "mine", 2, where="model.path").version == 2  # named outright, it is not in doubt
    entry = rollback(Store(), "mine", 1, note="it is better")
    assert (entry.number, entry.version) == (4, 1)
    assert promoted.find(Store(), "mine", None, where="model.path").version == 1


def test_a_first_promotion_that_was_interrupted_is_made_again(isolated_store: Path) -> None:
    """It was killed between writing the version's record and moving the pointer."""
    script = (
        "import os, signal, sys\n"
        "from posttrain_lib.lineage import pointer\n"
        "from posttrain_lib.lineage.store import Store\n"
        "from steps.promote import promote\n"
        "pointer.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "promote(Store(), 'mine', sys.argv[1])\n"
    )
    folder = str(folder_of(publish_run()))
    assert subprocess.run([sys.executable, "-c", script, folder]).returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="no version is the current one"):
        promoted.find(Store(), "mine", None, where="model.path")
    assert promote(Store(), "mine", folder).version == 2
    assert promoted.find(Store(), "mine", None, where="model.path").version == 2


def test_the_list_marks_the_current_version_and_says_what_is_unusual(
    folders: list[Path], isolated_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollback(Store(), "mine", 2, note="answers got worse")
    promote(Store(), "other", str(folders[0]))
    marked = {row.split()[0]: row.split()[1] for row in listing(Store()).splitlines()[1:]}
    assert [label for label, current in marked.items() if current == "yes"] == ["models/mine@2", "models/other@1"]
    path = isolated_store / "models" / "mine" / "pointer.json"
    path.write_text(path.read_text()[:40])
    shown = listing(Store())
    assert "models/mine: the pointer of a promoted model is damaged" in shown
    marked = {row.split()[0]: row.split()[1] for row in shown.splitlines()[1:5]}
    assert marked == {**{f"models/mine@{version}": "?" for version in (1, 2, 3)}, "models/other@1": "yes"}
    main(["--list", "--json"])
    assert [json.loads(line)["current"] for line in capsys.readouterr().out.splitlines()] == [None, None, None, True]


def test_the_command_line(isolated_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    assert "no model was promoted" in capsys.readouterr().out
    folder = folder_of(publish_run())
    main(["--name", "mine", "--from", str(folder), "--note", "good"])
    assert f"models/mine@1 -> {folder}" in capsys.readouterr().out
    main(["--list", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps({**dataclasses.asdict(promoted.find(Store(), "mine", 1, where="")), "current": True})
    )
    main(["--name", "mine", "--history", "--json"])
    (entry,) = promoted.pointer_of(Store(), "mine").history
    raw = json.loads(capsys.readouterr().out)
    assert raw["digest"] == entry.digest() and raw["records"] == entry.records and raw["action"] == "promoted"
    with pytest.raises(SystemExit):
        main(["--name", "mine", "--from", str(folder), "--json"])
    assert "--json goes with --list or --history" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--name", "mine", "--from", "nowhere"])
    assert "neither a run, nor a promoted model, nor a folder" in capsys.readouterr().err
