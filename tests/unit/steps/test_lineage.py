"""``python -m steps.lineage``: every way to name a result, what is shown of it, and what is wrong in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.store import MANIFEST, Store
from posttrain_lib.schema.manifests import StepManifest
from steps.lineage import find, main, side_of
from steps.pipeline import plain_errors
from steps.promote import promote
from tests.support.traced import model_folder, publish_chain, rows_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(isolated_store: Path) -> Store:
    return Store(isolated_store)


@pytest.fixture
def made(store: Store, tmp_path: Path) -> dict[str, StepManifest]:
    return publish_chain(store, rows_file(tmp_path / "data"), model_folder(tmp_path / "hf"))


def hf(made: dict[str, StepManifest]) -> Path:
    return Path(made["export"].outputs["hf"].uri)


def test_every_name_leads_to_the_export(store: Store, made: dict[str, StepManifest], tmp_path: Path) -> None:
    promote(store, "mine", str(hf(made)))
    copy = tmp_path / "copy"
    shutil.copytree(hf(made), copy)
    shutil.copytree(hf(made).parent, tmp_path / "whole")
    key = made["export"].key
    names = [key, key[:12], f"export/{key[:6]}", "models/mine", "models/mine@1", str(hf(made)), str(hf(made).parent)]
    for name in [*names, str(hf(made) / "config.json"), str(copy), str(tmp_path / "whole")]:
        assert find(name, store=store, where="show").manifests == (made["export"],), name


@pytest.mark.parametrize("name", ["train/0000000000", "nothing", "0123456789ab", "export"])
def test_a_name_of_nothing(store: Store, made: dict[str, StepManifest], name: str) -> None:
    with pytest.raises(ConfigError, match="this names no result"):
        find(name, store=store, where="show")


def test_a_beginning_that_several_keys_have(store: Store, made: dict[str, StepManifest]) -> None:
    with store.scratch() as folder:
        shutil.copytree(hf(made).parent, folder, dirs_exist_ok=True)
        twin = StepManifest.from_dict({**made["export"].to_dict(), "key": made["export"].key[:20] + "0" * 44})
        store.publish(folder, twin)
    with pytest.raises(ConfigError, match="several results have keys that begin so") as caught:
        find(made["export"].key[:12], store=store, where="show")
    assert made["export"].key[:20] in str(caught.value.got) and twin.key[:20] in str(caught.value.got)


def test_a_folder_that_no_result_has(store: Store, made: dict[str, StepManifest], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no result in the store is this") as caught:
        find(str(tmp_path / "hf"), store=store, where="show")
    assert str(store.root) in str(caught.value.expected)


def test_show(store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["show", made["export"].key[:12], "--picture", str(tmp_path / "p.svg")])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"export/{made['export'].key}"
    assert "`- checkpoint <- train v1" in out and "rows.jsonl" in out and "not as it was" not in out
    assert (tmp_path / "p.svg").read_text().startswith("<svg ")


def test_what_is_gone_is_named_with_what_can_be_done(
    store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A raw file, and with it what would have to be made of it; a model folder that was changed."""
    rows = tmp_path / "data" / "rows.jsonl"
    rows.unlink()
    (tmp_path / "hf" / "model.safetensors").write_text("others")
    main(["show", made["export"].key[:12]])
    told = capsys.readouterr().out.partition("not as it was:")[2]
    assert f"it was {rows}, digest {made['inputs'].outputs['source:a'].digest}: put that content back" in told
    assert "changed: its digest is" in told
    assert f"prepare_data v1 {made['prepare_data'].key[:12]}" in told.partition("still there, made from it: ")[2]
    (store.result_folder("train", made["train"].key) / "last" / "weights").write_text("cut")
    main(["show", made["export"].key[:12]])
    told = capsys.readouterr().out.partition("not as it was:")[2]
    assert "damaged: last/weights" in told and "cannot be made again without" in told


def test_what_can_be_made_again_is_told_with_the_command(
    store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str]
) -> None:
    (store.result_folder("train", made["train"].key) / "last" / "weights").write_text("cut")
    main(["show", made["export"].key[:12]])
    told = capsys.readouterr().out.partition("not as it was:")[2]
    assert "can be made again" in told and "python flows/sft_flow.py resume start --origin-run-id 1" in told


def test_a_manifest_edited_by_hand_is_an_error(
    store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str]
) -> None:
    path = store.result_folder("train", made["train"].key) / MANIFEST
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": 0.1'))
    with pytest.raises(SystemExit) as stopped:
        main(["show", made["export"].key[:12]])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "the manifest was changed after it was published" in said and str(path) in said and "undo the change" in said


def test_diff_of_two_results_goes_by_their_steps(
    store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The second began with the first's export: of each step its own counts, step inputs too, whose results it passes
    on and keeps none of."""
    other = publish_chain(store, rows_file(tmp_path / "data"), hf(made), seed=7, run="2")
    names = [made["export"].key[:12], other["export"].key[:12]]
    main(["diff", *names])
    out = capsys.readouterr().out
    assert "first step that differs: inputs: inputs (model)" in out
    assert ["train.train.seed", "0", "7"] in [line.split() for line in out.splitlines()]
    main(["diff", *names, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["b"] == f"export/{other['export'].key}" and found["parts"]["environment"] == []


def test_the_steps_of_an_ancestor_are_not_a_result_s_own(
    store: Store, made: dict[str, StepManifest], tmp_path: Path
) -> None:
    second = publish_chain(store, rows_file(tmp_path / "new", "{}\n"), hf(made), seed=7, run="2")
    found = find(second["export"].key, store=store, where="diff")
    assert list(side_of(found, store).manifests.items()) == list(second.items())
    shutil.rmtree(store.result_folder("prepare_data", second["prepare_data"].key))
    del second["prepare_data"]
    assert side_of(found, store).manifests == second, "not the one that the ancestor was trained on"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name(store: Store, made: dict[str, StepManifest], name: str) -> None:
    """It is no other word for the working directory."""
    with pytest.raises(ConfigError, match="an empty name"):
        find(name, store=store, where="show")


def test_a_misspelt_name_and_a_short_key_are_told_what_would_do(store: Store, made: dict[str, StepManifest]) -> None:
    with pytest.raises(ConfigError) as caught:
        find("SFTFow/latest", store=store, where="show")
    assert caught.value.fix == "did you mean SFTFlow/latest?" and "RetrainFlow" in str(caught.value.expected)
    with pytest.raises(ConfigError, match="6 characters of a key or more"):
        find(f"train/{made['train'].key[:5]}", store=store, where="show")
    assert find(f"train/{made['train'].key[:6]}", store=store, where="show").manifests == (made["train"],)


def test_a_picture_that_cannot_be_written(
    store: Store, made: dict[str, StepManifest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["show", made["export"].key, "--picture", str(tmp_path / "none" / "p.svg")])
    assert stopped.value.code == 1 and "StoreError: drawing the picture failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--picture", "p.png"], "'p.png' does not end in .svg"),
        (["--depth", "-3"], "'-3' is no number of steps"),
        (["--depth", "some"], "'some' is no number of steps"),
    ],
)
def test_options_that_cannot_be(option: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["show", "models/mine", *option])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_what_is_printed(store: Store, made: dict[str, StepManifest], unbuffered: str) -> None:
    """As behind ``| head``: no traceback, be the pipe found broken by a line or at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        command = [sys.executable, "-m", "steps.lineage", "show", made["export"].key]
        settings = {**os.environ, "POSTTRAIN_STORE": str(store.root), "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, env=settings, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error_as_any() -> None:
    with pytest.raises(BrokenPipeError), plain_errors():
        raise BrokenPipeError("of a worker")


def test_help_tells_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["show", "--help"], ["diff", "--help"]):
        with pytest.raises(SystemExit):
            main(command)
        out = capsys.readouterr().out
        assert "models/my-model@3" in out and "the first 6 characters" in out
