"""What decides the result of the step ``warm_start``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from posttrain_lib.config import load_run_config
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import warm_start
from steps.base import content_key
from tests.support.exported import publish_run


@pytest.mark.usefixtures("isolated_store")
def test_a_template_of_its_own_that_was_changed_is_other_work(tmp_path: Path) -> None:
    template, prompts = tmp_path / "template.jinja", tmp_path / "prompts.jsonl"
    template.write_text("{{ messages }}")
    prompt = {
        "source": "a",
        "row_id": "a:0",
        "prompt_ids": [1],
        "messages": [],
        "answer": "x",
        "tools": [],
        "extra": {},
    }
    prompts.write_text(json.dumps(prompt) + "\n")
    config = load_run_config(
        PROJECT_ROOT / "configs" / "grpo" / "default.yaml", [f"grpo.warm_start.data.chat_template={template}"]
    )
    some = StepManifest.from_dict(publish_run()["export"])
    outputs = {"model": ArtifactRef("folder", "model", "0"), "train_prompts": ArtifactRef(str(prompts), "prompts", "0")}
    manifests = dict.fromkeys(("convert_model", "prepare_data"), dataclasses.replace(some, outputs=outputs))

    def key() -> str:
        return content_key(warm_start.STEP, config, warm_start.inputs(config, manifests))[0]

    before = key()
    assert key() == before
    template.write_text("{{ messages }} ")
    assert key() != before
