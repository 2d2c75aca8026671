"""``python -m steps.store``: report and clean."""

import os
import time
from pathlib import Path

from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import StepManifest
from steps.store import clean, report


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
