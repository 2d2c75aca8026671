"""``python -m steps.store``: report and clean."""

import os
import shutil
import time
from pathlib import Path

import pytest

from posttrain_lib.adapters.metaflow_runs import FlowRun
from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import StepManifest
from steps.promote import promote
from steps.store import clean, main, report
from tests.support.traced import model_folder, publish_chain, rows_file


def publish(store: Store, key: str, age_days: float) -> None:
    manifest = StepManifest("prepare", 1, key, {}, {}, {}, {}, (), {}, {}, {}, "2026-01-01", 0.0)
    with store.scratch() as folder:
        (folder / "data").write_bytes(b"x" * 2**20)
        store.publish(folder, manifest)
    then = time.time() - age_days * 86_400
    os.utime(store.result_folder("prepare", key) / "manifest.json", (then, then))


def test_report_counts_and_clean_removes_only_the_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, "old", age_days=10)
    publish(store, "new", age_days=0)
    assert "2 entries, 2.0 MiB" in report(store)
    assert "would remove steps/prepare/old" in clean(store, older_than_days=7, dry_run=True, tagged=[])
    assert len(store.entries()) == 2
    assert "freed 1.0 MiB" in clean(store, older_than_days=7, dry_run=False, tagged=[])
    assert [entry.key for entry in store.entries()] == ["new"]


def test_a_use_makes_a_result_young_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, "old", age_days=10)
    assert store.find("prepare", "old") is not None
    clean(store, older_than_days=7, dry_run=False, tagged=[])
    assert store.find("prepare", "old") is not None


def old(store: Store) -> None:
    for folder in store.root.glob("steps/*/*"):
        os.utime(folder / "manifest.json", (1, 1))


def keys(store: Store) -> set[tuple[str, str]]:
    return {(entry.step, entry.key) for entry in store.entries()}


def flow_run(made: dict[str, StepManifest]) -> FlowRun:
    plain = {step: manifest.to_dict() for step, manifest in made.items()}
    return FlowRun("SFTFlow", "2", "successful", ("good", "kept"), plain, {})


def test_what_a_tagged_run_came_from_stays(isolated_store: Path, tmp_path: Path) -> None:
    """The run that it began with too; its brother of another seed goes, save for what both were made of."""
    store = Store()
    first = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    exported = Path(first["export"].outputs["hf"].uri)
    tagged = publish_chain(store, rows_file(tmp_path, "{}\n", name="b.jsonl"), exported, seed=1, run="2")
    brother = publish_chain(store, rows_file(tmp_path, "{}\n", name="b.jsonl"), exported, seed=2, run="3")
    old(store)
    wanted = {(m.step, m.key) for m in [*list(first.values())[1:], *tagged.values()]}
    before = keys(store)
    said = clean(store, older_than_days=7, dry_run=True, tagged=[flow_run(tagged)])
    assert keys(store) == before
    clean(store, older_than_days=7, dry_run=False, tagged=[flow_run(tagged)])
    assert keys(store) == wanted
    assert "kept (for SFTFlow/2, tagged good, kept) steps/train" in said
    gone = before - wanted
    assert (brother["train"].step, brother["train"].key) in gone
    assert said.count("would remove") == len(gone)
    for step, key in gone:
        assert f"would remove steps/{step}/{key[:12]} (" in said


def test_what_a_promoted_model_came_from_stays(isolated_store: Path, tmp_path: Path) -> None:
    store = Store()
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    promote(store, "mine", made["export"].outputs["hf"].uri)
    old(store)
    clean(store, older_than_days=7, dry_run=False, tagged=[])
    assert {step for step, _ in keys(store)} == {"prepare_data", "train", "export"}


def test_a_run_whose_results_are_gone_keeps_what_is_left(isolated_store: Path, tmp_path: Path) -> None:
    store = Store()
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    shutil.rmtree(store.result_folder("train", made["train"].key))
    old(store)
    clean(store, older_than_days=7, dry_run=False, tagged=[flow_run(made)])
    assert {step for step, _ in keys(store)} == {"inputs", "prepare_data", "export"}


def test_a_manifest_changed_by_hand_stops_the_clean_up(isolated_store: Path, tmp_path: Path) -> None:
    """What must stay cannot be known by it, so nothing goes."""
    store = Store()
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    promote(store, "mine", made["export"].outputs["hf"].uri)
    path = store.result_folder("train", made["train"].key) / "manifest.json"
    path.write_text(path.read_text().replace(made["prepare_data"].key, "0" * 64))
    old(store)
    before = keys(store)
    with pytest.raises(StoreError, match="changed after it was published"):
        clean(store, older_than_days=7, dry_run=False, tagged=[])
    assert keys(store) == before


def test_nothing_is_removed_unless_asked(
    isolated_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    old(store)
    main(["clean"])
    out = capsys.readouterr().out
    assert "0 tagged runs in Metaflow's records in" in out and "nothing was removed: --remove does it" in out
    assert len(store.entries()) == 4
    main(["clean", "--remove"])
    assert not store.entries()
    assert "nothing was removed" not in capsys.readouterr().out
