"""The flows of the recipes beyond SFT: real Metaflow runs of a few steps, each on the results of the one before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.test_sft_flow import ROOT, TINY, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objectives")


def run(home: Path, flow: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a flow printed, and the manifests of its steps by name."""
    path = home / f"{flow}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "flows" / f"{flow}_flow.py"), "--no-pylint", "--config", str(path), "run"]
    done = subprocess.run(
        [*command, "--run-id-file", str(home / f"{flow}.id")], env=environment(home), cwd=home, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    name = {"sft": "SFTFlow", "dpo": "DPOFlow", "reward": "RewardFlow", "distill": "DistillFlow"}[flow]
    script = (
        "import json, sys\nfrom metaflow import Run, namespace\nnamespace(None)\n"
        f"print(json.dumps(Run('{name}/' + open(sys.argv[1]).read()).data.manifests))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(home / f"{flow}.id")], env=environment(home), cwd=home, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout, json.loads(told.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    config["export"] = {**config.get("export", {}), "verify_vllm": False}
    config["evaluation"] = {"samples": 1, "max_new_tokens": 4}
    return config


def pairs(tiny: dict[str, Any], recipe: str, **sections: Any) -> dict[str, Any]:
    """The tiny run on pairs, from the tiny SFT run's model."""
    data = {
        **tiny["data"],
        "sources": [{"name": "p", "format": "preference", "generate": {"rows": 60, "pairs": True}}],
        "max_example_tokens": 1024,
        "serving_check": "off",
    }
    train = {**tiny["train"], "row_tokens": 1024}
    return {**tiny, "recipe": recipe, "name": recipe, "data": data, "train": train,
            "model": {"path": "SFTFlow/latest"}, **sections}  # fmt: skip


@pytest.fixture(scope="module")
def sft(home: Path, tiny: dict[str, Any]) -> dict[str, Any]:
    return run(home, "sft", tiny)[1]


def figures(manifests: dict[str, Any]) -> list[dict[str, Any]]:
    text = Path(manifests["train"]["outputs"]["metrics"]["uri"]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_dpo(home: Path, tiny: dict[str, Any], sft: dict[str, Any]) -> None:
    said, manifests = run(home, "dpo", pairs(tiny, "dpo"))
    assert "model.path: SFTFlow/latest" in said
    first = figures(manifests)[0]
    # the policy begins as the reference, whose log-probs were stored: log 2, but for the rounding of other rows
    assert first["held_out"]["all"] == pytest.approx(0.693147, abs=1e-3)
    assert abs(first["held_out_figures"]["rewards/margin"]) < 1e-3
    assert manifests["score_data"]["metrics"]["bytes_per_token"] > 0
    assert manifests["convert_model"]["outputs"]["model"]["uri"] == sft["export"]["outputs"]["hf"]["uri"]


def test_reward(home: Path, tiny: dict[str, Any], sft: dict[str, Any]) -> None:
    from transformers import AutoModelForSequenceClassification

    _, manifests = run(home, "reward", pairs(tiny, "reward"))
    assert "rewards/accuracy" in figures(manifests)[-1]["held_out_figures"]
    folder = manifests["export"]["outputs"]["hf"]["uri"]
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert model.score.weight.shape[0] == 1
    readme = (Path(folder) / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code + "print(float(score))"], cwd=folder, capture_output=True, text=True
    )
    assert math.isfinite(float(done.stdout)), done.stderr
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("kept", ["live", "stored"])
def test_distillation(home: Path, tiny: dict[str, Any], sft: dict[str, Any], kept: str) -> None:
    teacher = {"path": "SFTFlow/latest", "kept": kept, **({"top_k": 8} if kept == "stored" else {})}
    _, manifests = run(home, "distill", {**tiny, "recipe": "distill", "distill": {"teacher": teacher}})
    assert ("train" in manifests["score_data"]["outputs"]) == (kept == "stored")
    reports = figures(manifests)
    assert reports[-1]["held_out"]["all"] < reports[0]["held_out"]["all"]
    assert reports[-1]["figures"].keys() == {"distill/divergence"}
