"""From a result back to the raw files: over several runs, whatever is still there, and told as text and picture."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.graph import GONE, HERE, Graph, Raw, result_of, trace
from posttrain_lib.lineage.missing import missing
from posttrain_lib.lineage.picture import picture
from posttrain_lib.lineage.store import MANIFEST, Store
from posttrain_lib.lineage.tree import title, tree
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from tests.support.traced import model_folder, publish_chain, rows_file


def there(ref: ArtifactRef, _: StepManifest) -> Raw:
    return Raw(HERE if Path(ref.uri).exists() else GONE)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def two_runs(tmp_path: Path, store: Store) -> tuple[dict[str, StepManifest], dict[str, StepManifest]]:
    """The second began with what the first exported."""
    first = publish_chain(store, rows_file(tmp_path / "old"), model_folder(tmp_path / "hf"), run="1")
    exported = Path(first["export"].outputs["hf"].uri)
    second = publish_chain(store, rows_file(tmp_path / "new", "{}\n"), exported, run="2", seed=1)
    return first, second


def names(graph: Graph) -> list[str]:
    return sorted(title(node).split()[0] for node in graph.nodes.values())


def test_it_goes_on_into_the_run_that_made_the_model(two_runs: tuple, store: Store, tmp_path: Path) -> None:
    first, second = two_runs
    graph = trace(store, [second["export"]], there)
    assert graph.roots == (str(store.result_folder("export", second["export"].key)),)
    found = {(node.manifest.step, node.manifest.made_by.run) for node in graph.nodes.values() if node.manifest}
    assert found == {(step, run) for step in ("prepare_data", "train", "export") for run in "12"}
    raw = {node.ref.uri: node.ref.digest for node in graph.nodes.values() if node.manifest is None and node.ref}
    assert raw == {
        str(tmp_path / "old" / "rows.jsonl"): first["inputs"].outputs["source:a"].digest,
        str(tmp_path / "new" / "rows.jsonl"): second["inputs"].outputs["source:a"].digest,
        str(tmp_path / "hf"): first["inputs"].outputs["model"].digest,
    }
    assert all(node.state == HERE for node in graph.nodes.values())


def test_a_run_has_the_roots_that_nothing_of_it_uses(two_runs: tuple, store: Store) -> None:
    graph = trace(store, two_runs[1].values(), there)
    assert [Path(root).parent.name for root in graph.roots] == ["inputs", "export"]


def test_a_store_that_moved(two_runs: tuple, store: Store, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(store.root, moved)
    graph = trace(Store(moved), [two_runs[1]["export"]], there)
    assert len(graph.results()) == 6 and all(node.state == HERE for node in graph.nodes.values())


def test_results_in_another_store_are_found_by_where_they_lie(tmp_path: Path, store: Store) -> None:
    theirs = publish_chain(Store(tmp_path / "theirs"), rows_file(tmp_path), model_folder(tmp_path / "hf"))
    exported = Path(theirs["export"].outputs["hf"].uri)
    ours = publish_chain(store, rows_file(tmp_path), exported, run="2")
    assert ours["train"].key != theirs["train"].key and ours["export"].key == theirs["export"].key
    assert result_of(store, str(exported / "config.json")) == theirs["export"]
    graph = trace(store, [ours["export"]], there)
    assert sum(node.manifest is not None for node in graph.nodes.values()) == 6
    assert len(graph.roots) == 1 and tree(graph) and picture(graph), "equal keys, and yet no ring"


def test_what_is_gone_from_the_store_is_known_from_the_run(two_runs: tuple, store: Store) -> None:
    second = two_runs[1]
    for manifest in (second["train"], second["prepare_data"]):
        shutil.rmtree(store.result_folder(manifest.step, manifest.key))
    graph = trace(store, second.values(), there)
    lost = list(missing(graph))
    assert sorted(title(each.node).split()[0] for each in lost) == ["prepare_data", "train"]
    assert all(not each.lacking for each in lost), "all that they were made of is there"
    assert [title(node).split()[0] for each in lost for node in each.whole] == ["export", "export"]
    # Of the bare export nobody knows what stood between: the manifest of train went with it.
    bare = trace(store, [second["export"]], there)
    (nobody,) = missing(bare)
    assert "no manifest tells" in nobody.node.state and nobody.node.ref == second["export"].inputs["checkpoint"]


def test_raw_rows_that_are_gone_keep_what_was_made_of_them_from_being_made_again(
    two_runs: tuple, store: Store, tmp_path: Path
) -> None:
    second = two_runs[1]
    (tmp_path / "new" / "rows.jsonl").unlink()
    shutil.rmtree(store.result_folder("train", second["train"].key))
    lost = {title(each.node).split()[0]: each for each in missing(trace(store, second.values(), there))}
    assert set(lost) == {"rows", "train"}
    assert [node.ref for node in lost["train"].lacking] == [second["inputs"].outputs["source:a"]]
    assert {title(node).split()[0] for node in lost["rows"].whole} == {"inputs", "prepare_data", "export"}


def test_damage_and_other_content_of_the_same_key_are_told(two_runs: tuple, store: Store) -> None:
    first, second = two_runs
    Path(second["train"].outputs["last"].uri, "weights").write_text("cut")
    graph = trace(store, second.values(), there)
    assert "last/weights has 3 bytes" in graph.nodes[str(store.result_folder("train", second["train"].key))].state
    folder = store.result_folder("export", first["export"].key)
    shutil.rmtree(folder)
    with store.scratch() as out:
        (out / "hf").mkdir()
        other = ArtifactRef(first["export"].outputs["hf"].uri, "hf_model", "f" * 64)
        fields = {**first["export"].to_dict(), "outputs": {"hf": {**other.__dict__}}}
        store.publish(out, StepManifest.from_dict(fields))
    state = trace(store, first.values(), there).nodes[str(folder)].state
    assert state.startswith("made again by SFTFlow/1 at ") and state.endswith("with other content")


def test_a_manifest_changed_by_hand_ends_the_walk(two_runs: tuple, store: Store) -> None:
    first, second = two_runs
    path = store.result_folder("prepare_data", first["prepare_data"].key) / MANIFEST
    raw = json.loads(path.read_text())
    raw["inputs"]["source:a"]["digest"] = "0" * 64
    path.write_text(json.dumps(raw))
    with pytest.raises(StoreError, match="changed after it was published") as caught:
        trace(store, second.values(), there)
    assert caught.value.where == str(path) and "makes it again" in str(caught.value.fix)


def test_the_tree_tells_each_thing_once(two_runs: tuple, store: Store, tmp_path: Path) -> None:
    (tmp_path / "old" / "rows.jsonl").unlink()
    lines = tree(trace(store, two_runs[1].values(), there)).splitlines()
    assert lines[0].startswith(f"export v1 {two_runs[1]['export'].key[:12]}  SFTFlow/2  ")
    (row,) = (line for line in lines if "old/rows.jsonl" in line)
    assert row.endswith("[GONE]") and "source:a <- rows" in row
    assert row.index("source:a") > lines[1].index("checkpoint")
    assert sum("(above)" in line for line in lines) == 2  # what step inputs passed on stands in the tree twice
    assert sum(str(tmp_path / "hf") in line for line in lines) == 1


def test_files_of_something_raw_are_listed(tmp_path: Path, store: Store) -> None:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    files = tuple((f"part-{number}", f"{number}" * 64) for number in range(10, 20))
    shown = tree(trace(store, [made["prepare_data"]], lambda *_: Raw(HERE, files)))
    assert "|- part-10 101010101010" in shown and "`- and 2 more files" in shown


def test_the_picture_is_svg_and_has_every_node_and_line(two_runs: tuple, store: Store, tmp_path: Path) -> None:
    (tmp_path / "old" / "rows.jsonl").unlink()
    graph = trace(store, two_runs[1].values(), there)
    root = ElementTree.fromstring(picture(graph))
    space = "{http://www.w3.org/2000/svg}"
    boxes = root.findall(f"{space}g/{space}rect")
    assert len(boxes) == len(graph.nodes)
    assert len(root.findall(f"{space}path")) == sum(len(node.inputs) for node in graph.nodes.values())
    assert sum(box.get("fill") == "#ffcdd2" for box in boxes) == 1
    places = {(box.get("x"), box.get("y")) for box in boxes}
    assert len(places) == len(boxes), "no box covers another"
    corners = [re.findall(r"(-?\d+),(-?\d+)", path.get("d", "")) for path in root.findall(f"{space}path")]
    inner = {(int(x), int(y)) for points in corners for x, y in points[3:-1:3]}
    assert inner, "some line passes a column by"
    for box in boxes:
        left, top, width, height = (int(box.get(name, "")) for name in ("x", "y", "width", "height"))
        assert not any(left <= x <= left + width and top <= y <= top + height for x, y in inner), "a line under a box"
    written = {text.text for text in root.iter(f"{space}text")}
    assert {title(node) for node in graph.nodes.values()} <= written


def test_names_are_no_markup_in_a_picture(tmp_path: Path, store: Store) -> None:
    odd = rows_file(tmp_path, name="a<b>&'\".jsonl")
    made = publish_chain(store, odd, model_folder(tmp_path / "hf"))
    root = ElementTree.fromstring(picture(trace(store, made.values(), there)))
    assert any(text.text == odd.name for text in root.iter("{http://www.w3.org/2000/svg}text"))


def test_a_long_past_is_cut_for_showing_and_walked_whole(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a year of daily retrains, deeper than Python's stack."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them take a minute
    model = ArtifactRef(str(tmp_path / "hf"), "model", "0" * 64)
    for number in range(1100):
        key = f"{number:064x}"
        made = ArtifactRef(str(store.result_folder("train", key) / "last"), "checkpoint", key)
        values = ({"model": model}, {"last": made}, (), {}, {}, {}, "2026-01-01", 0.1)
        last = StepManifest("train", 1, key, {}, {}, *values)
        with store.scratch() as folder:
            last = store.publish(folder, last)
        model = made
    graph = trace(store, [last], there)
    assert len(graph.results()) == 1100
    assert [each.node.ref.digest for each in missing(graph) if each.node.ref] == ["0" * 64]
    assert tree(graph).count("\n") == 1100 and picture(graph).count("<rect ") == 1101
    near = graph.nearest(12)
    assert len(near.nodes) == 13 and tree(near).count("\n") == 12


def test_the_nearest_part_keeps_its_lines(two_runs: tuple, store: Store) -> None:
    graph = trace(store, [two_runs[1]["export"]], there)
    assert graph.nearest(99) == graph
    assert names(graph.nearest(1)) == ["export", "train"]
    assert names(graph.nearest(2)) == ["export", "export", "prepare_data", "train"]
