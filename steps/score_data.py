"""Step ``score_data``: what a frozen model says of every example, stored once.

DPO with ``reference.kept: precomputed`` needs each answer's log-probability under the reference, distillation with
``teacher.kept: stored`` the teacher's most likely tokens. Stored by the content of the data and the model, so that a
second run on the same pair pays nothing. Where the frozen model runs beside the trained one, there is nothing to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef
from steps import rollouts
from steps.base import Manifests, Step, StepContext, StepResult

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.evaluation.frozen import Progress
    from posttrain_lib.models.decoder import Decoder

SPLITS = ("train", "held_out")
_SAID_EVERY = 10  # of the examples' percent


def is_needed(config: RunConfig) -> bool:
    """Whether the run stores anything."""
    return config.companion is not None and config.companion.kept in ("precomputed", "stored")


def settings(config: RunConfig) -> dict[str, Any]:
    """What is stored, and what decides its rounding."""
    if not is_needed(config):
        return {"stored": None}
    distill = config.distill
    stored = {} if distill is None else {"top_k": distill.teacher.stored_entries, "temperature": distill.temperature}
    how = {"row_tokens": config.train.row_tokens, "precision": config.train.precision, "device": config.compute.device}
    return {"stored": config.recipe, **how, **stored}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The token stores, the frozen model, and the trained one for its vocabulary."""
    if not is_needed(config):
        return {}
    data = manifests["prepare_data"].outputs
    return {
        "train": data["train"],
        "held_out": data["held_out"],
        "companion": companion_of(config, manifests),
        "model": manifests["convert_model"].outputs["model"],
    }


def companion_of(config: RunConfig, manifests: Manifests) -> ArtifactRef:
    """The frozen model's folder: one of its own, or the model that training starts from."""
    own = manifests["inputs"].outputs.get("companion")
    return rollouts.start_model(config, manifests) if own is None else own


def body(context: StepContext) -> StepResult:
    """Run the frozen model once over both splits.

    Raises:
        ModelError: it cannot be loaded. DataError: an example is longer than a row.
    """
    if not is_needed(context.config):
        return StepResult({}, summary="nothing to store")
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.evaluation.model import load_model
    from posttrain_lib.training.device import pick_device

    device = pick_device(context.config.compute.device, 0)
    model = load_model(context.inputs["companion"].uri).to(device)
    made_of = {"model": context.inputs["companion"].digest}
    outputs: dict[str, tuple[str, str] | ArtifactRef] = {}
    size, tokens = 0, 0
    for split in SPLITS:
        store = TokenStore(Path(context.inputs[split].uri))
        folder = context.out / split
        _store(context, model, store, folder, made_of, split)
        outputs[split] = (split, "signals")
        size += sum(path.stat().st_size for path in folder.glob("*.npy"))
        tokens += store.trained_tokens
    per_token = size / max(1, tokens)
    return StepResult(
        outputs,
        metrics={"bytes": size, "trained_tokens": tokens, "bytes_per_token": per_token},
        summary=f"{size / 2**20:,.1f} MiB, {per_token:.1f} bytes a trained token",
    )


def _store(
    context: StepContext, model: Decoder, store: TokenStore, folder: Path, made_of: dict[str, str], split: str
) -> None:
    from posttrain_lib.evaluation.frozen import store_document_logprobs, store_top_logprobs
    from posttrain_lib.models.families import spec_from_folder

    config, progress = context.config, _progress(context, split)
    rows, precision = config.train.row_tokens, config.train.precision
    if config.distill is None:
        store_document_logprobs(model, store, folder, made_of, row_tokens=rows, precision=precision, progress=progress)
        return
    store_top_logprobs(
        model,
        store,
        folder,
        made_of,
        row_tokens=rows,
        precision=precision,
        top_k=config.distill.teacher.stored_entries,
        temperature=config.distill.temperature,
        vocab_size=spec_from_folder(context.inputs["model"].uri).config.vocab_size,
        progress=progress,
    )


def _progress(context: StepContext, split: str) -> Progress:
    """A line every so often."""
    said = 0

    def tell(done: int, total: int) -> None:
        nonlocal said
        percent = 100 * done // max(1, total)
        if percent >= said + _SAID_EVERY:
            said = percent
            context.say(f"score_data: {split}: {done:,} of {total:,} examples")

    return tell


STEP: Step = Step("score_data", 1, "steps.score_data", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("score_data")
