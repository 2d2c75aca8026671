"""What a run starts from: found or made, and a store that cannot be written said so."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.checkpoint.weight_files import POINTER
from posttrain_lib.config.load import build_run_config
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, DataError, ModelError, StoreError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.store import Store
from posttrain_lib.models.scratch import write_scratch_model
from posttrain_lib.schema.manifests import ArtifactRef
from steps import inputs, prepare_data
from steps.base import StepContext, run_step
from steps.promote import promote
from steps.start_from import with_models_found

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"from_scratch": {"architecture": {}, "tokenizer": "tokenizer"}},
    "train": {"steps": 10, "row_tokens": 64},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_store: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
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


@pytest.mark.parametrize("name", ["tokenizer", "chat_template"])
def test_a_tokenizer_or_template_edited_after_the_run_began_makes_no_result_under_the_old_key(
    here: Path, name: str
) -> None:
    """The result would be taken again once the file is as before, and then nothing would be made anew."""
    build_tokenizer(["a text"], 300, here / "tokenizer")
    shutil.copyfile(here / "tokenizer" / "chat_template.jinja", here / "template.jinja")
    (here / "rows.jsonl").write_text(
        json.dumps({"messages": [{"role": role, "content": "a text"} for role in ("user", "assistant")]}) + "\n"
    )
    data = {**RAW["data"], "tokenizer": "tokenizer", "chat_template": "template.jinja"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    write_scratch_model("llama", {**sizes, "num_key_value_heads": 1}, here / "tokenizer", 0, here / "model")
    config = build_run_config({**RAW, "data": data, "model": {"path": "model"}})
    found = {"inputs": run_step(inputs.STEP, config, {}, say=lambda _: None)}
    edited = here / {"tokenizer": "tokenizer/tokenizer.json", "chat_template": "template.jinja"}[name]
    edited.write_text(edited.read_text() + "\n ")
    with pytest.raises(DataError, match=f"the {name.replace('_', ' ')} is not what it was when the run started"):
        run_step(prepare_data.STEP, config, found, say=lambda _: None)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def with_more_ids(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {f"t{number}": number for number in range(999)}}})
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("["), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold an object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (cut, "truncated"),
        (with_more_ids, "larger than the embedding"),
    ],
    ids=["config", "list", "no weights", "cut", "tokenizer"],
)
def test_a_model_folder_is_refused_before_anything_is_read_whole(
    here: Path,
    tiny_folder: Callable[[str], Path],
    damage: Callable[[Path], Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_folder("llama"), here / "model")
    config = build_run_config({**RAW, "model": {"path": "model"}})
    assert inputs.inputs(config, {})["model"].uri == str(here / "model")
    damage(here / "model")
    monkeypatch.setattr(FileDigests, "path", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelError, match=said):
        inputs.inputs(config, {})


def test_a_promoted_model_that_was_changed_names_the_way_back(here: Path, tiny_folder: Callable[[str], Path]) -> None:
    folder = here / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    promote(Store(), "mine", str(folder))
    config = with_models_found(build_run_config({**RAW, "model": {"path": "models/mine"}}), say=lambda _: None)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match="changed after it was published") as caught:
        inputs.inputs(config, {})
    assert "--name mine --rollback VERSION --note WHY" in str(caught.value)


@pytest.mark.parametrize("kind", ["preference", "prompts"])
def test_rows_that_no_recipe_learns_from_are_refused_by_source(here: Path, kind: str) -> None:
    sources = [{"name": "a", "path": "rows.jsonl", "format": kind}]
    with pytest.raises(ConfigError, match="does not train on rows of this format") as caught:
        inputs.inputs(build_run_config({**RAW, "data": {**RAW["data"], "sources": sources}}), {})
    assert caught.value.where == "data.sources: a: format"
    assert "messages" in str(caught.value.expected) and kind not in str(caught.value.expected)


class TestModelInAStore:
    """On memory://, whose files tell when they were made; real object stores are in checkpoint/test_remote_weights."""

    @pytest.fixture
    def url(self, tiny_folder: Callable[[str], Path]) -> Iterator[str]:
        memory = fsspec.filesystem("memory")
        for path in tiny_folder("llama").iterdir():
            memory.pipe(f"/models/tiny/{path.name}", path.read_bytes())
        yield "memory://models/tiny"
        memory.rm("/models", recursive=True)

    def run(self, url: str, **more: Any) -> Any:
        raw = {**RAW, "data": {**RAW["data"], "tokenizer": "tokenizer"}, "model": {"path": url, **more}}
        return run_step(inputs.STEP, build_run_config(raw), {}, say=lambda _: None)

    @pytest.fixture(autouse=True)
    def _here(self, here: Path) -> None:
        """The tokenizer lies here."""

    def test_its_headers_are_checked_once_its_small_files_are_here(self, url: str) -> None:
        memory = fsspec.filesystem("memory")
        content = json.loads(memory.cat("/models/tiny/config.json"))
        memory.pipe("/models/tiny/config.json", json.dumps({**content, "intermediate_size": 5}).encode())
        with pytest.raises(ModelError, match="another shape than"):
            self.run(url)

    def test_later_steps_see_a_folder_with_a_pointer(self, url: str, tiny_folder: Callable[[str], Path]) -> None:
        first = self.run(url)
        folder = Path(first.outputs["model"].uri)
        assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer_config.json", POINTER}
        assert read_headers(folder) == read_headers(tiny_folder("llama"))
        assert first.inputs["model"].uri == url
        assert self.run(url).reused

    def test_another_version_is_another_input(self, url: str, tiny_folder: Callable[[str], Path]) -> None:
        first = self.run(url)
        content = (tiny_folder("llama") / "model.safetensors").read_bytes()
        fsspec.filesystem("memory").pipe("/models/tiny/model.safetensors", content)
        again = self.run(url)
        assert not again.reused
        assert again.outputs["model"].digest != first.outputs["model"].digest
        with pytest.raises(ModelError, match="was replaced in its store"):
            read_headers(first.outputs["model"].uri)

    def test_a_model_that_is_replaced_while_the_run_starts_is_refused(self, url: str, tmp_path: Path) -> None:
        found = inputs._stored_model(url)
        fsspec.filesystem("memory").pipe("/models/tiny/config.json", b"{}")
        with pytest.raises(ModelError, match="while the run started"):
            inputs._fetch_stored(found, tmp_path / "model")

    def test_an_empty_place_is_named(self) -> None:
        with pytest.raises(ModelError, match="does not exist") as caught:
            self.run("memory://models/nowhere")
        assert caught.value.where == "memory://models/nowhere"
