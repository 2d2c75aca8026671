"""Training that tokenises its rows as it goes, through the chain of steps: shares, refused rows, the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import load_run_config
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import train
from steps.base import StepContext
from steps.pipeline import run_until

TINY = Path(__file__).resolve().parents[2] / "flows" / "tiny.yaml"


def _rows(path: Path, name: str, count: int) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            asked = {"role": "user", "content": f"What of {name} {number}?"}
            said = {"role": "assistant", "content": "so " * (1 + number % 9)}
            handle.write(json.dumps({"messages": [asked, said] if number % 40 != 7 else [asked]}) + "\n")


def _config(folder: Path, *overrides: str) -> RunConfig:
    text = TINY.read_text(encoding="utf-8")
    sources = "".join(f'    - {{name: {name}, path: "{folder}/{name}.jsonl"}}\n' for name in ("more", "less"))
    generated = "    - {name: generated, generate: {rows: 200}}\n"
    path = folder / "run.yaml"
    path.write_text(text.replace(generated, generated + sources), encoding="utf-8")
    return load_run_config(path, ["compute.launcher=in_process", "data.max_refused_fraction=0.05", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, dict[str, StepManifest]]:
    folder = tmp_path_factory.mktemp("live")
    _rows(folder / "more.jsonl", "more", 400)
    _rows(folder / "less.jsonl", "less", 300)
    shares = "{generated: {weight: 1}, more: {weight: 6}, less: {weight: 3}}"
    config = _config(
        folder,
        "data.on_the_fly=true",
        "data.on_the_fly_sample=60",
        "train.shuffle_window=50",
        "train.packing_buffer=16",
        f"train.mixture={{by: tokens, sources: {shares}}}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_STORE", str(folder / "store"))
        return folder, config, run_until("train", config, say=lambda text: None)


def test_the_proportions_are_those_asked_for(trained: tuple[Path, RunConfig, dict[str, StepManifest]]) -> None:
    metrics = trained[2]["train"].metrics
    shares = {name: given["token_share"] for name, given in metrics["sources"].items()}
    # Steps of 1,536 slots, eight of them: a unit of 150 tokens is 1 %, and the packer holds back up to 16 short ones.
    assert shares == pytest.approx({"generated": 0.1, "more": 0.6, "less": 0.3}, abs=0.05)
    assert metrics["rows"]["rows"] > metrics["rows"]["units"] > 0
    reports = [json.loads(line) for line in Path(trained[2]["train"].outputs["metrics"].uri).read_text().splitlines()]
    assert set(reports[-1]["source_loss"]) <= set(shares) and reports[-1]["source_loss"]


def test_refused_rows_are_kept(trained: tuple[Path, RunConfig, dict[str, StepManifest]]) -> None:
    manifest = trained[2]["train"]
    lines = [json.loads(line) for line in Path(manifest.outputs["quarantine"].uri).read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"no_assistant_turn"}
    assert len(lines) >= manifest.metrics["rows"]["refused"] > 0
    assert all(line["row"]["messages"] for line in lines)


def test_data_of_another_template_is_refused(trained: tuple[Path, RunConfig, dict[str, StepManifest]]) -> None:
    folder, config, manifests = trained
    other = config.model_copy(update={"data": config.data.model_copy(update={"template_date": "2031-05-05"})})
    inputs = train.inputs(other, manifests)
    context = StepContext(other, inputs, folder / "out", folder / "work", print, print)
    with pytest.raises(DataError, match="another template"):
        train.body(context)


def test_rows_that_changed_since_the_run_began_are_refused(
    trained: tuple[Path, RunConfig, dict[str, StepManifest]], tmp_path: Path
) -> None:
    _, config, manifests = trained
    _rows(tmp_path / "less.jsonl", "other", 300)
    inputs = train.inputs(config, manifests)
    old = inputs["source:less"]
    inputs["source:less"] = ArtifactRef(str(tmp_path / "less.jsonl"), old.kind, old.digest)
    context = StepContext(config, inputs, tmp_path / "out", tmp_path / "work", print, print)
    with pytest.raises(DataError, match="not what it was") as caught:
        train.body(context)
    assert "less" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.shuffle_window=null", "shuffle_window"),
        ("train.mixture={sources: {more: {weight: 1}}}", "weigh every source"),
        ("train.mixture={by: tokens}", "sizes of the sources"),
        ("data.deduplicate=true", "deduplicate"),
    ],
)
def test_what_needs_the_whole_data_set_is_refused_at_once(
    trained: tuple[Path, RunConfig, dict[str, StepManifest]], override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _config(trained[0], "data.on_the_fly=true", "train.shuffle_window=50", override)


def test_the_sample_is_what_is_prepared(trained: tuple[Path, RunConfig, dict[str, StepManifest]]) -> None:
    prepared = trained[2]["prepare_data"]
    assert [counts["rows"] for counts in prepared.metrics["sources"].values()] == [60, 60, 60]
    assert len(TokenStore(prepared.outputs["held_out"].uri)) > 0


def test_data_that_ends_before_the_steps_is_said_where_it_ends_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_STORE", str(tmp_path / "store"))
    for name in ("more", "less"):
        _rows(tmp_path / f"{name}.jsonl", name, 60)
    shares = "{generated: {weight: 0}, more: {weight: 1}, less: {weight: 1}}"
    config = _config(
        tmp_path,
        "data.on_the_fly=true",
        "data.on_the_fly_sample=60",
        "train.shuffle_window=50",
        "train.packing_buffer=16",
        "train.steps=500",
        f"train.mixture={{exhausted: stop, sources: {shares}}}",
    )
    said: list[str] = []
    manifests = run_until("train", config, say=said.append)
    metrics = manifests["train"].metrics
    end = f"the data ends after {metrics['step']} of the 500 steps asked for"
    assert metrics["data_end"] == end and 0 < metrics["step"] < 500
    assert any(end in line and "finished" in line for line in said)
    # Killed between the last checkpoint and the result: the checkpoint tells that nothing is left.
    work = tmp_path / "again"
    context = StepContext(config, train.inputs(config, manifests), tmp_path / "out", work, said.append, print)
    work.mkdir()
    context.out.mkdir()
    checkpoints = Path(manifests["train"].outputs["last"].uri).parent
    shutil.copytree(checkpoints, work / "checkpoints")
    said.clear()
    assert train.body(context).metrics["data_end"] == end
    said = [line for line in said if line.startswith("[")]  # the plan stands before it
    assert len(said) == 1 and "(resumed)" in said[0]
