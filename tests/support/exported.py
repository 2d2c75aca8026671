"""Results like those of a run of SFTFlow, published by the real machinery in no time: no model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_lib.config.load import build_run_config
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import Check, StepManifest
from steps.base import Step, StepContext, StepResult, run_step

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"path": "folder"},
    "train": {"steps": 10, "row_tokens": 64},
}
_TRAINED = {
    **dict.fromkeys(("data_end", "mfu", "mfu_measured", "hfu")),
    **dict.fromkeys(("step", "tokens_seen", "tokens_per_second", "fill", "data_wait_share", "peak_memory_gib"), 1),
}


def publish_run(
    store: Store | None = None,
    *,
    words: str = "weights",
    architecture: str = "Qwen3ForCausalLM",
    exact_match: float = 0.9,
    proven: bool = True,
) -> dict[str, dict[str, Any]]:
    """The manifests of train, evaluate and export, in plain form. ``words`` stand in for the exported weights;
    ``proven``: whether the export's check passed."""
    match = {"after": exact_match, "before": 0.0, "majority": 0.1, "majority_answer": "no", "prompts": 8}
    evaluated = {"held_out_before": {"all": 4.0}, "held_out_after": {"all": 2.0}, "exact_match": match}

    def export(context: StepContext) -> StepResult:
        folder = context.out / "hf"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (folder / "model.safetensors").write_text(words)
        return StepResult({"hf": ("hf", "hf_model")}, checks=[Check("logits agree", proven, 0.5, 1.0)])

    bodies = {
        "train": lambda _: StepResult({}, metrics=_TRAINED),
        "evaluate": lambda _: StepResult({}, metrics=evaluated),
        "export": export,
    }
    manifests: dict[str, StepManifest] = {}
    for name, body in bodies.items():
        said = [words, architecture, exact_match, proven]
        step = Step(name, 1, "posttrain_lib.errors", lambda _, s=said: s, lambda *_: {}, body)
        manifests[name] = run_step(step, build_run_config(RAW), manifests, store=store, say=lambda _: None)
    return {name: manifest.to_dict() for name, manifest in manifests.items()}


def folder_of(manifests: dict[str, dict[str, Any]]) -> Path:
    """The exported Hugging Face folder."""
    return Path(manifests["export"]["outputs"]["hf"]["uri"])
