"""Real runs done again from their lineage: on the same code, after the code was changed, and with inputs that moved.

All of it in a clone of the checkout, whose code is changed on purpose on the way; so the tests go in their order.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_lib.embedded.pairs import generate_pairs
from posttrain_lib.lineage.patch import uncommitted
from tests.flows.test_grpo_flow import small
from tests.flows.test_objective_flows import pairs
from tests.flows.test_sft_flow import ROOT, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CHANGED = Path("posttrain_lib") / "optim" / "schedules.py"


def git(folder: Path, *arguments: str, given: bytes = b"") -> None:
    who = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, input=given, check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it is, all of it committed."""
    patch = uncommitted(ROOT).content
    if patch is None:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("reproduced") / "clone"
    git(ROOT, "clone", "-q", "--shared", str(ROOT), str(folder))
    if patch:
        git(folder, "apply", "--whitespace=nowarn", "-", given=patch)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", "As it is.")
    return folder


def flow(clone: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    home = clone.parent
    variables = {
        **os.environ,
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "POSTTRAIN_STORE": str(home / "store"),
        "PYTHONPATH": f"{clone}{os.pathsep}{clone / 'flows'}",
    }
    command = [sys.executable, str(clone / "flows" / f"{name}_flow.py"), "--no-pylint", *options]
    return subprocess.run(
        command, env=variables, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )


def run(clone: Path, name: str, config: dict[str, Any]) -> None:
    path = clone.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = flow(clone, name, "--config", str(path), "run")
    assert done.returncode == 0, done.stdout


def reproduce(clone: Path, origin: str, *options: str) -> subprocess.CompletedProcess[str]:
    return flow(clone, "reproduce", "run", "--origin", origin, *options)


def assert_reproduced(done: subprocess.CompletedProcess[str], steps: int) -> None:
    assert done.returncode == 0 and "reproduced, bit for bit" in done.stdout, done.stdout
    assert len(re.findall(r"compare/.*\] \w+ +equal +[-\d.]+ ->", done.stdout)) == steps, done.stdout


def card_of(clone: Path, done: subprocess.CompletedProcess[str]) -> str:
    """What the card of a reproduction holds, as JSON."""
    run, path = re.search(r"run-id (\d+)", done.stdout), clone.parent / "card.html"
    assert run is not None
    shown = flow(clone, "reproduce", "card", "get", f"{run[1]}/compare", str(path), "--id", "report")
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', path.read_text(encoding="utf-8"))
    assert data is not None, shown.stdout
    return base64.b64decode(data[1]).decode()


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    return {**config, "evaluation": {"samples": 1, "max_new_tokens": 4}, "compute": {"threads_per_worker": 1}}


def test_sft_on_the_same_code(clone: Path, tiny: dict[str, Any]) -> None:
    run(clone, "sft", tiny)
    done = reproduce(clone, "SFTFlow/latest")
    assert_reproduced(done, 7)
    assert "this checkout, commit" in done.stdout and re.search(r"\d+ s to prepare, \d+ s to run", done.stdout)
    assert not list((clone.parent / "store" / "tmp").glob("reproduced-*")), "cleared away where all is equal"
    card = card_of(clone, done)
    assert "reproduced, bit for bit" in card and card.count(">equal<") == 7


def test_dpo_and_grpo_on_the_same_changed_checkout(clone: Path, tiny: dict[str, Any]) -> None:
    """Their code is a commit and a patch, with a file that git does not know yet."""
    with open(clone / "posttrain_lib" / "errors.py", "a", encoding="utf-8") as handle:
        handle.write("# a note\n")
    (clone / "posttrain_lib" / "notes.py").write_text('"""Notes."""\n', encoding="utf-8")
    rows = clone.parent / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(60, seed=0)), encoding="utf-8")
    dpo = pairs(tiny, "dpo")
    dpo["data"]["sources"] = [{"name": "p", "format": "preference", "path": rows.name}]
    run(clone, "dpo", dpo)
    assert_reproduced(reproduce(clone, "DPOFlow/latest"), 8)
    grpo = small()
    grpo["grpo"]["warm_start"]["train"].update(steps=30, evaluate_every_steps=30)
    grpo["grpo"]["held_out"] = {"prompts": 6, "samples": 2, "every_steps": 3}
    grpo["train"].update(steps=6)
    run(clone, "grpo", grpo)
    assert_reproduced(reproduce(clone, "GRPOFlow/latest"), 8)


def test_after_a_change_of_the_code(clone: Path) -> None:
    """The recorded code is brought back: of a commit, and of a commit with its patch; the rows have moved besides."""
    path = clone / CHANGED
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('group["lr"] = lr', 'group["lr"] = 1.5 * lr'), encoding="utf-8")
    git(clone, "commit", "-q", "-a", "-m", "A larger step.")
    assert text != path.read_text(encoding="utf-8")
    sft = reproduce(clone, "SFTFlow/latest")
    assert_reproduced(sft, 7)
    assert re.search(r"code +commit [0-9a-f]{12}\n", sft.stdout)
    rows = clone.parent / "pairs.jsonl"
    moved = clone.parent / "elsewhere" / rows.name
    moved.parent.mkdir()
    rows.rename(moved)
    dpo = reproduce(clone, "DPOFlow/latest", "--input", f"source:p={moved}")
    assert_reproduced(dpo, 8)
    assert re.search(r"code +commit [0-9a-f]{12} with patch [0-9a-f]{12}\n", dpo.stdout)
    assert_reproduced(reproduce(clone, "GRPOFlow/latest"), 8)


def test_the_changed_code_is_named_with_the_step_that_it_changes(clone: Path) -> None:
    done = reproduce(clone, "SFTFlow/latest", "--code", "here")
    assert done.returncode != 0 and "the run does not reproduce" in done.stdout and "Traceback" not in done.stdout
    assert "step train: the first that differs" in done.stdout
    assert re.search(rf"code: .*{CHANGED.as_posix()}", done.stdout)
    assert "first loss that differs: step 2 loss" in done.stdout
    kept = re.search(r"what was made is kept in (\S+)", done.stdout)
    assert kept is not None and list(Path(kept[1]).glob("store/steps/train/*/manifest.json"))


def test_rows_that_were_changed_or_are_gone_are_named(clone: Path) -> None:
    elsewhere = clone.parent / "elsewhere" / "pairs.jsonl"
    gone = reproduce(clone, "DPOFlow/latest")
    assert gone.returncode != 0 and "cannot be reproduced without its inputs" in gone.stdout
    assert "pairs.jsonl: gone; it was digest" in gone.stdout and "--input source:p=PATH" in gone.stdout
    assert "still in the store, whole: inputs, prepare_data" in gone.stdout
    with open(elsewhere, "a", encoding="utf-8") as handle:
        handle.write("{}\n")
    changed = reproduce(clone, "DPOFlow/latest", "--input", f"source:p={elsewhere}")
    assert changed.returncode != 0 and "this is not the input that the run had" in changed.stdout
    elsewhere.rename(clone.parent / "pairs.jsonl")
    assert "changed: its digest is" in reproduce(clone, "DPOFlow/latest").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["SFTFlow/1"], "SFTFlow has no such run"),
        (["PretrainFlow/1"], "there is no such flow"),
        (["models/mine"], "this names no run"),
        (["SFTFlow/latest", "--input", "rows=x"], "this gives no input of the run"),
        (["SFTFlow/latest", "--code", "there"], "this is neither of two words"),
    ],
)
def test_what_cannot_be_asked(clone: Path, options: list[str], said: str) -> None:
    done = reproduce(clone, *options)
    assert done.returncode != 0 and said in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_without_git_the_code_is_in_metaflow_s_package(clone: Path) -> None:
    """The last one, for it takes the clone's history away."""
    (clone / ".git").rename(clone / "history")
    done = reproduce(clone, "SFTFlow/latest")
    assert_reproduced(done, 7)
    assert "Metaflow's package of the run's code" in done.stdout
