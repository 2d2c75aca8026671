"""``configs/grpo/gsm8k_calculator.yaml`` as it stands, with fewer rows and a smaller model: every step runs on it."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest

from posttrain_lib.config.load import load_run_config
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.rl.version_log import read_log
from steps.pipeline import run_until

CONFIG = PROJECT_ROOT / "configs" / "grpo" / "gsm8k_calculator.yaml"
SMALLER = [
    "data.serving_check=off",
    "model.from_scratch.architecture.hidden_size=16",
    "model.from_scratch.architecture.intermediate_size=32",
    "model.from_scratch.architecture.num_hidden_layers=2",
    "grpo.prompts_per_step=2",
    "grpo.group_size=2",
    "grpo.rollout.max_new_tokens=8",
    "grpo.environment.max_turns=2",
    "grpo.held_out.prompts=2",
    "grpo.held_out.samples=1",
    "grpo.warm_start.train.epochs=null",
    "grpo.warm_start.train.steps=2",
    "grpo.warm_start.train.rows_per_step=1",
    "grpo.warm_start.train.micro_batch_rows=1",
    "grpo.warm_start.train.schedule.warmup_steps=0",
    "train.steps=2",
    "train.schedule.warmup_steps=0",
    "evaluation.samples=1",
    "export.verify_vllm=false",
    "compute.launcher=in_process",
    "compute.threads_per_worker=1",
]


@pytest.fixture
def some_data(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the config names, with sixty rows."""
    folder = tmp_path / "data"
    shutil.copytree(real_data / "tokenizers" / "qwen2.5", folder / "tokenizers" / "qwen2.5")
    (folder / "gsm8k").mkdir()
    with open(real_data / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
        (folder / "gsm8k" / "train.jsonl").write_text("".join(islice(lines, 60)), encoding="utf-8")
    monkeypatch.setenv("POSTTRAIN_DATA", str(folder))
    return folder


@pytest.mark.slow
def test_every_step_runs(some_data: Path, isolated_store: Path) -> None:
    manifests = run_until("export", load_run_config(CONFIG, SMALLER), say=lambda _: None)
    assert list(manifests) == [
        "inputs", "prepare_data", "check_serving", "convert_model", "warm_start", "train", "evaluate", "export",
    ]  # fmt: skip
    lines = Path(manifests["train"].outputs["metrics"].uri).read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["step"] for report in reports] == [0, 1, 2]
    assert all(report["figures"]["mismatch/kl"] < 1e-5 for report in reports[1:]), "float32 twice, in another order"
    answers = read_log(Path(manifests["train"].outputs["rollouts"].uri))
    assert answers and all(answer["turns"][0]["role"] == "assistant" for answer in answers)
