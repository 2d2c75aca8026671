"""What came from outside of a run, what has become of it, and which code it was made with."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import fsspec
import pytest

from posttrain_lib.data.sources import digest_rows
from posttrain_lib.errors import ConfigError, StoreError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.graph import GONE, HERE
from posttrain_lib.lineage.kept import keep, record_file
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import landed
from steps.base import run_step
from steps.landed import RowsToTake, new_files
from steps.recorded import FLOWS, Code, code_of, from_outside, is_run, lineage_of, look, recorded_run
from tests.support.s3 import s3_environment, s3_server
from tests.support.traced import model_folder, publish_chain, rows_file

FLOW_FILES = (Path(__file__).parents[3] / "flows").glob("*_flow.py")


@pytest.fixture
def store(isolated_store: Path) -> Store:
    return Store(isolated_store)


def rows(path: str) -> ArtifactRef:
    return ArtifactRef(path, "rows", digest_rows(path, FileDigests()))


def test_inputs_from_outside(store: Store, tmp_path: Path) -> None:
    first = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    assert from_outside(first) == first["inputs"].inputs
    second = publish_chain(store, rows_file(tmp_path), Path(first["export"].outputs["hf"].uri), seed=1)
    assert from_outside(second)["model"].uri == first["export"].outputs["hf"].uri, "another run's result"


def test_a_name_that_means_two_things_is_told_apart(store: Store, tmp_path: Path) -> None:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    judge = ArtifactRef(str(tmp_path / "judge"), "model", "1" * 64)
    made["export"] = dataclasses.replace(made["export"], inputs={**made["export"].inputs, "model": judge})
    assert from_outside(made)["export.model"] == judge
    assert from_outside(made)["model"] == made["inputs"].inputs["model"]


def test_look_at_rows(store: Store, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "data")
    one, every = rows(str(path)), rows(str(tmp_path / "data" / "*.jsonl"))
    assert look(one).state == look(every).state == HERE
    assert look(one).files == look(every).files == (("rows.jsonl", FileDigests().file(path)),)
    rows_file(tmp_path / "data", "{}\n", name="more.jsonl")
    assert look(one).state == HERE and look(every).state.startswith("changed: its digest is ")
    path.write_text('{"text": "b"}\n')
    assert look(one).state.startswith("changed")
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    assert look(one).state == look(every).state == GONE


def taken(folder: Path | str) -> StepManifest:
    """Step ``take_rows`` of all that a folder has."""
    wanted = RowsToTake(str(folder), new_files(str(folder), (), "stop").files)
    return run_step(landed.STEP, wanted, {}, say=lambda _: None)  # type: ignore[arg-type]


def test_landed_files_are_what_they_were_until_their_rows_change(store: Store, tmp_path: Path) -> None:
    """They are known by their content alone, and only what was there when they were taken counts."""
    path = rows_file(tmp_path / "landing", name="day[1].jsonl")
    made = taken(tmp_path / "landing")
    (ref,) = made.inputs.values()
    assert ref.digest == FileDigests().file(path) != digest_rows(str(path), FileDigests())
    assert {node.state for node in lineage_of({"take_rows": made}).nodes.values()} == {HERE}
    with open(path, "a") as file:
        file.write('{"text": "late"}\n')
    assert look(ref, made).state == HERE
    path.write_text('{"text": "b"}\n{"text": "late"}\n')
    assert look(ref, made).state == f"changed: its digest is {FileDigests().file(path)[:12]} now"
    path.write_text("{}")
    assert look(ref, made).state == f"changed: its digest is {FileDigests().file(path)[:12]} now"
    path.unlink()
    assert look(ref, made).state == GONE


def test_landed_files_in_an_object_store(store: Store) -> None:
    with s3_server() as url, s3_environment(url):
        s3 = fsspec.filesystem("s3")
        s3.mkdir("landing")
        s3.pipe("landing/rows/a.jsonl", b'{"text": "one"}\n')
        made = taken("s3://landing/rows")
        (ref,) = made.inputs.values()
        assert look(ref, made).state == HERE
        s3.pipe("landing/rows/a.jsonl", b'{"text": "one"}\n{"text": "late"}\n')
        assert look(ref, made).state == HERE
        s3.pipe("landing/rows/a.jsonl", b'{"text": "two"}\n')
        assert look(ref, made).state.startswith("changed: its digest is ")


def test_look_at_a_model_folder(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "hf")
    ref = ArtifactRef(str(folder), "model", FileDigests().path(folder))
    assert [name for name, _ in look(ref).files] == ["config.json", "model.safetensors"]
    (folder / "model.safetensors").write_text("others")
    assert look(ref).state.startswith("changed")


def test_rows_in_a_store_that_cannot_be_asked(store: Store) -> None:
    found = look(ArtifactRef("memory://nowhere/rows.jsonl", "rows", "0" * 64))
    assert found.state.startswith("cannot be read: ")


def test_lineage_is_looked_at(store: Store, tmp_path: Path) -> None:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    assert {node.state for node in lineage_of(made).nodes.values()} == {HERE}


def manifest(**code: str) -> StepManifest:
    return StepManifest("train", 1, "k", {}, {}, {}, {}, (), {}, {}, code, "2026-01-01", 0.0)


def test_the_code_of_a_step(store: Store) -> None:
    patch = keep(store, b"diff", "patch")
    file = record_file(store, patch, "patch")
    known = {"commit": "c", "uncommitted_changes": "yes"}
    assert code_of(store, manifest(commit="c", uncommitted_changes="no")) == Code("c", None, None, "")
    assert code_of(store, manifest(**known, patch=patch)) == Code("c", patch, file, "")
    lacks = code_of(store, manifest(**known, patch=patch, patch_left_out="a.bin (2.0 MiB)")).lacks
    assert "a.bin (2.0 MiB)" in lacks
    assert "9.0 MiB of changes" in code_of(store, manifest(**known, patch_not_kept="9.0 MiB of changes")).lacks
    assert "format 1" in code_of(store, manifest(**known)).lacks
    assert "git checkout" in code_of(store, manifest()).lacks
    file.write_bytes(b"other")
    with pytest.raises(StoreError, match="changed after it was kept"):
        code_of(store, manifest(**known, patch=patch))
    file.unlink()
    gone = code_of(store, manifest(**known, patch=patch))
    assert gone.patch_file is None and "gone from" in gone.lacks


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("SFTFlow/17", True),
        ("GRPOFlow/latest", True),
        ("ConvertFlow/tag:kind:a", True),
        ("models/mine", False),
        ("train/0123456789ab", False),
        ("SFTFlow/a/b", False),
    ],
)
def test_names_of_runs(reference: str, wanted: bool) -> None:
    assert is_run(reference) is wanted


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("SFTFow/17", "did you mean SFTFlow/17?"),
        ("sftflow/17", "did you mean SFTFlow/17?"),
        ("SFTFlow", "did you mean SFTFlow/latest?"),
        ("RetranFlow/latest", "did you mean RetrainFlow/latest?"),
        ("models/tiny", "python -m steps.lineage show models/tiny tells the run that made it"),
    ],
)
def test_what_names_no_run_is_told_with_what_was_meant(store: Store, reference: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recorded_run(reference, store=store, where="--origin")
    assert caught.value.fix == meant and caught.value.where == "--origin"
    assert all(flow in str(caught.value.expected) for flow in FLOWS)


def test_the_flows_are_those_that_there_are() -> None:
    """But for the two whose runs leave no manifests."""
    classes = re.findall(r"^class (\w+Flow)\(", "".join(map(Path.read_text, FLOW_FILES)), flags=re.MULTILINE)
    bases = {"TrainingFlow", "ComparingFlow"}
    assert set(FLOWS) == {*classes} - bases - {"AuditFlow", "ReproduceFlow"}
