"""What decides the result of the step ``lm_eval``; the harness itself is not among the locked packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.schema.manifests import StepManifest
from steps import lm_eval
from steps.base import content_key
from tests.support.exported import RAW, publish_run


@pytest.mark.usefixtures("isolated_store")
def test_a_task_file_of_one_s_own_that_was_changed_is_other_work(tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "mine.yaml"
    task.parent.mkdir()
    task.write_text("task: mine\nmetric: acc\n")
    asked = {"tasks": ["mine"], "include_path": str(task.parent)}
    config = build_run_config({**RAW, "evaluation": {"lm_eval": asked}})
    manifests = {name: StepManifest.from_dict(raw) for name, raw in publish_run().items()}

    def key() -> str:
        return content_key(lm_eval.STEP, config, lm_eval.inputs(config, manifests))[0]

    before = key()
    assert key() == before
    task.write_text("task: mine\nmetric: f1\n")
    assert key() != before
