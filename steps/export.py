"""Step ``export``: a Hugging Face folder from a checkpoint, and the proof that it is the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import ExportError
from posttrain_lib.lineage.store import disk_errors
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps import evaluate
from steps.base import Manifests, Step, StepContext, StepResult

if TYPE_CHECKING:
    from posttrain_lib.adapters.vllm_check import Answer
    from posttrain_lib.models.decoder import Decoder

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def settings(config: RunConfig) -> dict[str, Any]:
    """The export section, and the template's date and variables."""
    return {
        "export": config.export.model_dump(mode="json"),
        "template": [config.data.template_date, config.data.template_kwargs],
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The checkpoint, the source folder with its tokenizer, prompts to compare on; and that it was evaluated."""
    found = {key: ref for key, ref in evaluate.inputs(config, manifests).items() if key != "held_out"}
    return {**found, "evaluation": manifests["evaluate"].outputs["evaluation"]}


def body(context: StepContext) -> StepResult:
    """Write the folder, then load it back in transformers and in vLLM and compare with the trained model."""
    from posttrain_lib.checkpoint.hf import exported_dtype, save_hf_folder
    from posttrain_lib.checkpoint.manager import load_model_state
    from posttrain_lib.evaluation.model import load_model

    source, folder = Path(context.inputs["model"].uri), context.out / "hf"
    model = load_model(str(source))
    state = load_model_state(context.inputs["checkpoint"].uri)
    dtype = exported_dtype(source, context.config.export.dtype)
    save_hf_folder(state, model.spec, source, folder, dtype, tokenizer_folder=Path(context.inputs["tokenizer"].uri))
    if "chat_template" in context.inputs:
        shutil.copyfile(context.inputs["chat_template"].uri, folder / "chat_template.jinja")
    # Comparisons are with the weights as exported: rounding to the export's dtype is a choice of the run file.
    model.load_state_dict({name: value.to(dtype).float() for name, value in state.items()})
    checks = [*_same_tokenizer(context, folder), *_same_in_transformers(context, model, folder)]
    if context.config.export.verify_vllm:
        checks += _same_in_vllm(context, model, folder)
    for check in checks:
        context.say(f"export: {'passed' if check.passed else 'FAILED'} {check.name} ({show(check)})")
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ExportError(
            f"the exported folder does not prove itself: {failed[0].name}",
            where=folder,
            got=failed[0].value,
            expected=f"at most {failed[0].limit}",
            fix=failed[0].reason,
        )
    _copy_out(context, folder)
    (context.out / "verification.json").write_text(json.dumps([vars(check) for check in checks], indent=1), encoding="utf-8")
    return StepResult(
        outputs={"hf": ("hf", "hf_model"), "verification": ("verification.json", "verification")},
        checks=checks,
        metrics={"dtype": str(dtype).removeprefix("torch.")},
        summary=f"{len(checks)} checks passed",
    )


def show(check: Check) -> str:
    """``value, limit limit`` for the terminal."""
    value = f"{check.value:.3g}" if isinstance(check.value, float) else str(check.value)
    limit = f"{check.limit:.3g}" if isinstance(check.limit, float) else str(check.limit)
    return f"{value}, limit {limit}"


def _prompts(context: StepContext, limit_tokens: int) -> list[list[int]]:
    rows = evaluate.read_prompts(Path(context.inputs["prompts"].uri))
    fitting = [row["prompt_ids"] for row in rows if len(row["prompt_ids"]) <= limit_tokens]
    return fitting[: context.config.export.prompts]


def _same_tokenizer(context: StepContext, folder: Path) -> list[Check]:
    """Every tokenizer file of the input stands in the export byte for byte."""
    from posttrain_lib.checkpoint.hf import tokenizer_files

    source = Path(context.inputs["tokenizer"].uri)
    replaced = {"chat_template.jinja"} if "chat_template" in context.inputs else set()
    names = [name for name in tokenizer_files(source) if name not in replaced]
    different = [n for n in names if not (folder / n).is_file() or (source / n).read_bytes() != (folder / n).read_bytes()]
    return [
        Check(
            "tokenizer files byte-equal",
            not different,
            ", ".join(different) or f"{len(names)} files",
            "0 differences",
            "a changed tokenizer or template is a silent skew between training and serving",
        )
    ]


def _same_in_transformers(context: StepContext, model: Decoder, folder: Path) -> list[Check]:
    from posttrain_lib.checkpoint.verify import compare_with_reference

    return compare_with_reference(model, folder, _prompts(context, limit_tokens=1024))


def _same_in_vllm(context: StepContext, model: Decoder, folder: Path) -> list[Check]:
    from posttrain_lib.adapters import vllm_check
    from posttrain_lib.evaluation.generation import token_logprobs

    if not vllm_check.is_available():
        raise ExportError(
            "vLLM is not installed, so the export cannot be proven",
            where="export.verify_vllm",
            fix="install the environment from the lock, or set export.verify_vllm: false",
        )
    settings = context.config.export
    room = min(1024, model.config.max_position_embeddings) - settings.new_tokens
    prompts = _prompts(context, room)
    context.say(f"export: loading the folder in vLLM, {len(prompts)} prompts")
    request = vllm_check.Request(str(folder), prompts, settings.new_tokens, "float32", room + settings.new_tokens)
    answer = vllm_check.generate(request)
    ours = token_logprobs(model, [p + a for p, a in zip(prompts, answer.token_ids, strict=True)])
    gap = max(
        abs(mine - theirs)
        for row, before, after in zip(ours, answer.prompt_logprobs, answer.logprobs, strict=True)
        for mine, theirs in zip(row, [*before, *after], strict=True)
    )
    limit = settings.max_logprob_gap
    reason = "vLLM packs and fuses its linear layers, so sums are rounded in another order"
    return [
        Check(f"vLLM {answer.version} log-probs of prompts and completions", gap <= limit, gap, limit, reason),
        _same_greedy_text(context, model, prompts, answer),
    ]


def _same_greedy_text(context: StepContext, model: Decoder, prompts: list[list[int]], answer: Answer) -> Check:
    """vLLM's greedy tokens are ours, or part where our two best tokens are closer than the log-prob bound."""
    from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs

    tokenizer = evaluate.load_tokenizer(context.config, context.inputs)
    limit, parted = context.config.export.max_logprob_gap, 0
    mine = greedy_generate(model, prompts, context.config.export.new_tokens, tokenizer.stop_ids)
    for prompt, ours, theirs in zip(prompts, mine, answer.token_ids, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            continue
        both = token_logprobs(model, [prompt + ours[: at + 1], prompt + theirs[: at + 1]])
        parted += both[0][-1] - both[1][-1] > 2 * limit  # each side may be off by the bound
    reason = "a different greedy token where ours is clearly ahead means different weights, template or positions"
    return Check("vLLM greedy text agrees", parted == 0, float(parted), 0.0, reason)


def _copy_out(context: StepContext, folder: Path) -> None:
    if context.config.export.output is None:
        return
    target = Path(context.config.export.output).expanduser()
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors("copying the export", target):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if target.exists():
            raise ExportError("the output folder exists", where="export.output", got=target, fix="remove it or name another")
        partial.rename(target)


STEP = Step("export", 1, "steps.export", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("export")
