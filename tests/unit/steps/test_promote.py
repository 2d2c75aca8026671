"""``python -m steps.promote``: versions count up, what failed is refused, what was promoted is not cleaned away."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError, ModelError, StoreError, VerificationError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.store import MANIFEST, Store
from steps.promote import listing, main, promote
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


def test_the_command_line(isolated_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    assert "no model was promoted" in capsys.readouterr().out
    folder = folder_of(publish_run())
    main(["--name", "mine", "--from", str(folder), "--note", "good"])
    assert f"models/mine@1 -> {folder}" in capsys.readouterr().out
    main(["--list", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps(dataclasses.asdict(promoted.find(Store(), "mine", 1, where="")))
    )
    with pytest.raises(SystemExit):
        main(["--name", "mine", "--from", "nowhere"])
    assert "neither a run, nor a promoted model, nor a folder" in capsys.readouterr().err
