"""Results that were made of each other, published by the real machinery in no time: rows -> data -> model -> export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.sources import digest_rows
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import ArtifactRef, Check, MadeBy, StepManifest
from steps.base import Step, StepContext, StepResult, results_of, run_step
from tests.support.exported import RAW


def rows_file(folder: Path, text: str = '{"text": "a"}\n', name: str = "rows.jsonl") -> Path:
    """Raw rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def model_folder(folder: Path) -> Path:
    """Weights that no step made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (folder / "model.safetensors").write_text("weights")
    return folder


def publish_chain(
    store: Store, rows: Path, model: Path, *, seed: int = 0, run: str = "1", passed: bool = True, loss: float = 1.0
) -> dict[str, StepManifest]:
    """The manifests of inputs, prepare_data, train and export, of a run that began with ``rows`` and ``model``."""
    digests = FileDigests()
    raw = {
        "source:a": ArtifactRef(str(rows), "rows", digest_rows(str(rows), digests)),
        "model": ArtifactRef(str(model), "model", digests.path(model)),
    }

    def write(context: StepContext, name: str) -> None:
        path = context.out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} {seed}")

    def inputs(context: StepContext) -> StepResult:
        return StepResult(dict(context.inputs))

    def prepare(context: StepContext) -> StepResult:
        write(context, "train/tokens")
        counted = {"sources": {"a": {"rows": 1, "tokens": seed}}, "refused": {}}
        return StepResult({"train": ("train", "tokens")}, metrics=counted)

    def train(context: StepContext) -> StepResult:
        write(context, "last/weights")
        return StepResult({"last": ("last", "checkpoint")}, metrics={"step": 1, "loss": loss})

    def export(context: StepContext) -> StepResult:
        write(context, "hf/model.safetensors")
        (context.out / "hf" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
        return StepResult({"hf": ("hf", "hf_model")}, checks=[Check("logits agree", passed, 0.5, 1.0)])

    Made = Mapping[str, StepManifest]
    chain: list[tuple[str, Any, Any]] = [
        ("inputs", lambda m: raw, inputs),
        ("prepare_data", lambda m: {"source:a": m["inputs"].outputs["source:a"]}, prepare),
        ("train", lambda m: {"train": m["prepare_data"].outputs["train"], "model": raw["model"]}, train),
        ("export", lambda m: {"checkpoint": m["train"].outputs["last"]}, export),
    ]
    manifests: dict[str, StepManifest] = {}
    config = build_run_config(RAW, overrides=[f"train.seed={seed}"])
    for name, wanted, body in chain:
        settings: dict[str, Any] = {"train": {"seed": seed, "loss": loss}} if name in ("train", "export") else {}

        def found(_: Any, made: Made, wanted: Any = wanted) -> dict[str, ArtifactRef]:
            return wanted(made)

        step = Step(name, 1, "posttrain_lib.errors", lambda _, s=settings: s, found, body)
        with results_of(MadeBy("SFTFlow", run, name, "tester")):
            manifests[name] = run_step(step, config, manifests, store=store, say=lambda _: None)
    return manifests
