"""What a run starts from: found or made, and a store that cannot be written said so."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError, DataError, StoreError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.schema.manifests import ArtifactRef
from steps import inputs, prepare_data
from steps.base import StepContext

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"from_scratch": {"architecture": {}}},
    "train": {"steps": 10, "row_tokens": 64},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_store: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def test_a_relative_source_is_known_by_its_absolute_path(here: Path) -> None:
    found = inputs.inputs(build_run_config(RAW), {})
    assert found["source:a"].uri == str(here / "rows.jsonl")


def test_a_store_that_cannot_be_written_is_a_store_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileDigests) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "digests.json")

    monkeypatch.setattr(FileDigests, "save", refuse)
    with pytest.raises(StoreError, match="remembering file digests failed") as caught:
        inputs.inputs(build_run_config(RAW), {})
    assert "POSTTRAIN_STORE" in str(caught.value)


def test_a_missing_model_is_named_by_its_field(here: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        inputs.inputs(build_run_config({**RAW, "model": {"path": "./nowhere"}}), {})
    assert caught.value.where == "model.path"


def test_rows_that_were_edited_after_the_run_began_are_refused(here: Path) -> None:
    """As a resumed run would meet them: its inputs were recorded before the edit."""
    config = build_run_config(RAW)
    recorded = inputs.inputs(config, {})
    (here / "rows.jsonl").write_text('{"other": 1}\n')
    context = StepContext(
        config=config,
        inputs={**recorded, "tokenizer": ArtifactRef("nowhere", "tokenizer", "d")},
        out=here / "out",
        work=here / "work",
        say=lambda text: None,
        observe=lambda report: None,
    )
    with pytest.raises(DataError, match="not what it was when the run started") as caught:
        prepare_data.body(context)
    assert "resume start" in str(caught.value)
