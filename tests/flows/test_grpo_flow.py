"""Reinforcement learning as a flow: a real Metaflow run, and a driver that is killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.rl.ledger import FATES
from posttrain_lib.rl.version_log import read_log
from tests.flows.test_sft_flow import ROOT, environment
from tests.support.ledgers import trained_visits

pytestmark = pytest.mark.slow

DEFAULT = PROJECT_ROOT / "configs" / "grpo" / "default.yaml"


def small(**train: Any) -> dict[str, Any]:
    """The default with a warm start of 60 steps and 24 updates: it learns little, and has every part."""
    config: dict[str, Any] = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    config["data"]["sources"][0]["generate"]["rows"] = 300
    config["data"]["serving_check"] = "off"
    config["grpo"]["warm_start"]["data"]["sources"][0]["generate"]["rows"] = 600
    config["grpo"]["warm_start"]["train"].update(steps=60, evaluate_every_steps=60)
    config["grpo"].update(prompts_per_step=4, group_size=4, held_out={"prompts": 12, "samples": 2, "every_steps": 6})
    config["train"].update(steps=24, checkpoint={"every_steps": 3, "keep_last": 2}, **train)
    config["evaluation"] = {"samples": 2}
    config["export"] = {"verify_vllm": False}
    config["compute"] = {"threads_per_worker": 1}
    return config


def flow(home: Path, config: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    path = home / "grpo.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "flows" / "grpo_flow.py"), "--no-pylint", "--config", str(path), "run"]
    return subprocess.run(
        [*command, "--run-id-file", str(home / "id"), *options], env=environment(home), cwd=home, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
    )  # fmt: skip


def manifests_of(home: Path) -> dict[str, Any]:
    script = (
        "import json, sys\nfrom metaflow import Run, namespace\nnamespace(None)\n"
        "print(json.dumps(Run('GRPOFlow/' + open(sys.argv[1]).read()).data.manifests))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(home / "id")], env=environment(home), cwd=home, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def test_the_flow_runs_to_an_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = flow(tmp_path, small())
    assert done.returncode == 0, done.stdout
    manifests = manifests_of(tmp_path)
    assert list(manifests) == [
        "inputs", "prepare_data", "check_serving", "convert_model", "warm_start", "train", "evaluate", "export",
    ]  # fmt: skip
    lines = Path(manifests["train"]["outputs"]["metrics"]["uri"]).read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["step"] for report in reports] == list(range(25))
    for name in ("reward/mean", "mismatch/kl", "rollout/entropy", "rollout/staleness", "time/update_seconds"):
        assert all(name in report["figures"] for report in reports[1:]), name
    assert {"pass@1", "sampled_pass@2"} <= reports[-1]["held_out_figures"].keys() and reports[-1]["answers"]
    rows = {row["metric"] for row in manifests["evaluate"]["metrics"]["comparison"]}
    assert {"pass@1", "reward", "sampled_pass@2"} <= rows
    assert Path(manifests["train"]["outputs"]["rollouts"]["uri"]).read_text(encoding="utf-8").count("\n") == 24 * 9
    AutoModelForCausalLM.from_pretrained(manifests["export"]["outputs"]["hf"]["uri"])


def learned(work: Path) -> int:
    """Updates in the log of a run that is under way."""
    return sum(len(read_log(path)) for path in work.glob("*/ledger.jsonl"))


def test_kills_at_random_moments_lose_and_repeat_no_prompt(tmp_path: Path) -> None:
    """The step's process (policy, engine and controller) and whatever grades beside it, killed up to eight times."""
    config = tmp_path / "grpo.yaml"
    config.write_text(yaml.safe_dump(small()), encoding="utf-8")
    variables = {**environment(tmp_path), "POSTTRAIN_STORE": str(tmp_path / "store")}

    def start(step: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"steps.{step}", "--config", str(config)]
        log = open(tmp_path / "log", "ab")  # noqa: SIM115 - the process writes to it
        return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    assert start("warm_start").wait(300) == 0
    work, draw, kills = tmp_path / "store" / "work" / "train", random.Random(0), 0
    while kills < 8:
        process = start("train")
        if draw.random() < 0.25:
            time.sleep(draw.uniform(0.0, 6.0))  # somewhere in its start
        else:
            updates = learned(work) + draw.randrange(1, 4)
            while process.poll() is None and learned(work) < updates:
                time.sleep(0.02)
            time.sleep(draw.uniform(0.0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    else:
        process = start("train")
    assert process.wait(300) == 0, (tmp_path / "log").read_text(errors="replace")[-4000:]
    assert kills >= 3, "the run ended before it could be killed"
    (folder,) = (
        path for path in (tmp_path / "store" / "steps" / "train").iterdir() if (path / "ledger.jsonl").exists()
    )
    lines = read_log(folder / "ledger.jsonl")
    assert [line["version"] for line in lines] == list(range(1, 25))
    settled = [visit[0] for line in lines for fate in FATES for visit in line[fate]]
    assert sorted(settled) == list(range(96)) and trained_visits(lines) == settled
