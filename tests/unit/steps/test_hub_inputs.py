"""A run whose rows, tokenizer and model are all on the hub: fetched by the real clients from a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, DataError
from steps import inputs
from tests.support.faulty_proxy import Fault
from tests.support.hub import Hub, hub_environment, hub_in_process, hub_server
from tests.support.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[3]
RUN: dict[str, Any] = {
    "name": "hub",
    "data": {
        "sources": [{"name": "chat", "path": "hf://owner/chat?split=train_sft"}],
        "tokenizer": "owner/tokenizer",
        "max_example_tokens": 512,
        "held_out": {"fraction": 0.2},
        "serving_check": "off",
    },
    "model": {"path": "owner/model"},
    "train": {"steps": 2, "row_tokens": 512},
}
README = "---\nconfigs:\n- config_name: default\n  data_files: [{split: train_sft, path: 'rows-*.jsonl'}]\n---\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    texts = (turn["content"] for row in generate_rows(50, 0) for turn in row["messages"])
    build_tokenizer(texts, 320, root / "tokenizer")
    model = write_tiny_model("llama", root / "model", vocab_size=320)
    (model / "more").mkdir()
    (model / "more" / "notes.txt").write_text("a file in a folder")
    return {"tokenizer": root / "tokenizer", "model": model}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    rows = [json.dumps(row) + "\n" for row in generate_rows(60, 1)]
    with hub_server() as hub:
        files = {f"rows-{part}.jsonl": "".join(rows[20 * part :][:20]) for part in range(3)}
        hub.commit("datasets", "owner/chat", {"README.md": README, **files})
        for name, folder in folders.items():
            hub.commit("models", f"owner/{name}", folder)
        yield hub
        assert not hub.unknown, "the stand-in lacks something that the clients ask for"


def prepare(hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """``python -m steps.prepare_data`` as a user starts it, with a store and caches of its own."""
    home.mkdir(exist_ok=True)
    (home / "run.yaml").write_text(json.dumps(RUN))
    environment = {**os.environ, **hub_environment(hub, home / "hf"), "POSTTRAIN_STORE": str(home / "store")}
    return subprocess.run(
        [sys.executable, "-m", "steps.prepare_data", "--config", str(home / "run.yaml")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def receipt_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    (receipt,) = (line.split()[1] for line in done.stdout.splitlines() if line.split()[0] == "receipt")
    return json.loads(Path(receipt).read_text())


@pytest.mark.slow  # every process imports torch and datasets
@pytest.mark.timeout(600)
def test_a_run_starts_from_ids_alone_and_is_reused_until_the_hub_moves(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(1, 503, key="/rows-1"), Fault(1, after_bytes=2000, key="/storage/")]
    receipt = receipt_of(prepare(hub, tmp_path))
    assert receipt["sources"]["chat"]["rows"] == 60, receipt
    assert not any(fault.times for fault in hub.faults)

    hub.asked.clear()
    again = prepare(hub, tmp_path)
    assert again.returncode == 0 and "reuse" in again.stdout + again.stderr
    assert not hub.paths("rows-"), "no row is read again"

    rows = "".join(json.dumps(row) + "\n" for row in generate_rows(20, 3))
    hub.commit("datasets", "owner/chat", {"README.md": README, "rows-0.jsonl": rows})
    moved = receipt_of(prepare(hub, tmp_path))
    assert moved["sources"]["chat"]["rows"] == 20


@pytest.mark.slow
def test_a_gated_data_set_stops_the_run_with_one_plain_error(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["datasets", "owner/chat"].gated = True
    done = prepare(hub, tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "the data set is gated" in done.stderr and "HF_TOKEN" in done.stderr


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_store: Path) -> Iterator[Path]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with hub_in_process(hub, tmp_path / "hf"):
        yield tmp_path


def test_what_the_steps_get_of_the_hub(hub: Hub, here: Path, folders: dict[str, Path]) -> None:
    commit = hub.repositories["datasets", "owner/chat"].refs["main"]
    hub.page = 2  # trees come in pages
    found = inputs.inputs(build_run_config(RUN), {})
    assert found["source:chat"].uri == f"hf://owner/chat@{commit}?split=train_sft"
    for name, folder in folders.items():
        fetched = Path(found[name].uri)
        assert fetched.name == hub.repositories["models", f"owner/{name}"].refs["main"]
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {path: (fetched / path).read_bytes() for path in files} == files


def test_a_cut_download_of_a_model_is_whole(hub: Hub, here: Path, folders: dict[str, Path]) -> None:
    hub.faults = [Fault(2, after_bytes=5000, key="/storage/")]
    fetched = Path(inputs.inputs(build_run_config(RUN), {})["model"].uri)
    assert (fetched / "model.safetensors").read_bytes() == (folders["model"] / "model.safetensors").read_bytes()
    assert len(hub.paths("/storage/", "GET")) == 3


def test_what_the_hub_does_not_give_is_named_by_its_field(hub: Hub, here: Path) -> None:
    hub.repositories["models", "owner/model"].gated = True
    with pytest.raises(ConfigError, match=r"(?i)gated") as caught:
        inputs.inputs(build_run_config(RUN), {})
    assert caught.value.where == "model.path"
    with pytest.raises(ConfigError, match="owner/gone") as caught:
        inputs.inputs(
            build_run_config({**RUN, "data": {**RUN["data"], "tokenizer": "owner/gone"}, "model": {"path": "."}}), {}
        )
    assert caught.value.where == "data.tokenizer"
    source = {"name": "a", "path": "hf://owner/chat@gone"}
    with pytest.raises(DataError, match="no such revision"):
        inputs.inputs(build_run_config({**RUN, "data": {**RUN["data"], "sources": [source]}}), {})
