"""Step ``export``: a Hugging Face folder from a checkpoint, and the proof that it is the model that was trained."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.model import ModelConfig
from posttrain_lib.errors import ExportError
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps import beside, evaluate, rollouts
from steps.base import Manifests, Step, StepContext, StepResult
from steps.checks import outcome
from steps.loading import load_base, load_tokenizer, read_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain_lib.adapters.vllm_check import Answer
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import ModelSpec

#: the template file that transformers and vLLM prefer over one inside tokenizer_config.json
TEMPLATE_FILE = "chat_template.jinja"
#: in an exported folder: that it was trained as transformers' own class, and what that lacks
BACKEND_FILE = "posttrain_backend.json"


def settings(config: RunConfig) -> dict[str, Any]:
    """The export section, the checkpoint's padding, adapters and backend, and the template's date and variables."""
    return {
        "export": config.export.model_dump(mode="json"),
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
        **config.model.model_dump(mode="json", include={"lora", "backend"}),
        "reward": None if config.reward is None else config.reward.pad_token,
        "template": config.data.template_variables,
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The checkpoint, the source folder with its tokenizer, what to compare on; and that it was evaluated."""
    found = evaluate.inputs(config, manifests)
    found["model"] = rollouts.start_model(config, manifests)
    return {**found, "evaluation": manifests["evaluate"].outputs["evaluation"]}


def body(context: StepContext) -> StepResult:
    """Write the folder, adapters merged, then load it back in transformers and in vLLM and compare with the trained
    model. The adapters are written beside it, in PEFT's format."""
    import torch

    from posttrain_lib.checkpoint.adapters import trained_weights
    from posttrain_lib.checkpoint.exported import compare_with_reference, exported_dtype
    from posttrain_lib.checkpoint.hf import copy_side_files
    from posttrain_lib.checkpoint.manager import load_model_state
    from posttrain_lib.models.hf_spec import marks

    source, folder = Path(context.inputs["model"].uri), context.out / "hf"
    lora, backend = context.config.model.lora, context.config.model.backend
    dtype = exported_dtype(source, context.config.export.dtype, backend)
    model = load_base(context)
    trained = load_model_state(context.inputs["checkpoint"].uri)
    state = trained_weights(model, trained, lora)
    checks = [] if lora is None else [_export_adapter(context, model, trained)]
    _write(context, model, state, folder, dtype)
    names = copy_side_files(Path(context.inputs["tokenizer"].uri), folder)
    if "chat_template" in context.inputs:
        shutil.copyfile(context.inputs["chat_template"].uri, folder / TEMPLATE_FILE)
    # Comparisons are with the weights as exported: rounding to the export's dtype is a choice of the run file.
    model.load_state_dict({name: _rounded(value, getattr(torch, dtype)) for name, value in state.items()})
    checks += [_same_tokenizer(context, folder, names), *compare_with_reference(model, folder, _prompts(context, 1024))]
    if context.config.reward is not None:
        checks += _same_scores(context, model, folder)
        _say_how_to_score(context, folder)
    elif context.config.export.verify_vllm:
        checks += _same_in_vllm(context, model, folder)
    for check in checks:
        context.say(f"export: {outcome(check)}")
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ExportError(
            f"the exported folder does not prove itself: {failed[0].name}",
            where=folder,
            got=failed[0].value,
            expected=f"at most {failed[0].limit}",
            fix=failed[0].reason,
        )
    outputs: dict[str, tuple[str, str] | ArtifactRef] = {
        "hf": ("hf", "hf_model"),
        "verification": ("verification.json", "verification"),
    }
    if lora is not None:
        outputs["adapter"] = ("adapter", "adapter")
    found = json.dumps([vars(check) for check in checks], indent=1)
    (context.out / "verification.json").write_text(found, encoding="utf-8")
    return StepResult(
        outputs=outputs,
        checks=checks,
        metrics={"dtype": dtype, **marks(backend)},
        summary=f"{len(checks)} checks passed",
    )


def _write(context: StepContext, model: Decoder, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """The folder's weights and config, by our own writer or, of a class of transformers, by that one's; the second says
    so in a file beside them."""
    from posttrain_lib.checkpoint.hf import save_hf_folder
    from posttrain_lib.checkpoint.hf_backend import save_hf_model
    from posttrain_lib.models.hf_decoder import HFDecoder
    from posttrain_lib.models.hf_spec import marks

    source, mark = Path(context.inputs["model"].uri), folder / BACKEND_FILE
    if isinstance(model, HFDecoder):
        save_hf_model(model, state, source, folder, dtype)
        content = {"class": model.spec.architecture, **marks(context.config.model.backend)}
        mark.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        save_hf_folder(state, _spec(context), source, folder, dtype)
        mark.unlink(missing_ok=True)  # of the folder that training began with


def _spec(context: StepContext, *, padded: bool = True) -> ModelSpec:
    """Of the model that was trained; ``padded``: with the rows that its vocabulary has in memory."""
    from posttrain_lib.models.families import spec_from_folder
    from posttrain_lib.models.score import with_score_head
    from posttrain_lib.models.vocabulary import with_padded_vocabulary

    spec = spec_from_folder(context.inputs["model"].uri)
    if padded:
        spec = with_padded_vocabulary(spec, context.config.model.pad_vocabulary_to)
    if context.config.reward is None:
        return spec
    tokenizer = load_tokenizer(context.config, context.inputs)
    return with_score_head(spec, beside.score_padding(context.config, tokenizer))


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As read back in float32 from a file in ``dtype``; counters and masks are written as they are."""
    return value.to(dtype).float() if value.is_floating_point() else value


def _export_adapter(context: StepContext, model: Decoder, trained: Mapping[str, Tensor]) -> Check:
    """The adapters alone, for whoever has the base. A base that this run made (from scratch, or by new tokens) no one
    else has: it goes with them. What a reader cannot do with them is said."""
    from posttrain_lib.checkpoint.adapter_folder import compare_adapter, put_base, write_readme

    wanted, source, folder = context.config.model, Path(context.inputs["model"].uri), context.out / "adapter"
    name, revision = _name_of_base(wanted, source)
    remarks = _save_adapter(context, trained, name, revision)
    if wanted.path is not None and "://" in name:
        remarks.append("the base is in an object store, from where PEFT and vLLM do not load: fetch it first")
    if wanted.lora is not None and wanted.lora.freeze_new_tokens and (count := wanted.vocabulary.count()):
        remarks.append(f"the rows of the {count} new tokens are untrained, as model.lora.freeze_new_tokens asked for")
    for remark in remarks:
        context.say(f"export: adapter: {remark}")
    made = _is_made(wanted)
    base = put_base(source, folder) if made else source
    write_readme(folder, name, revision, enclosed=made, remarks=remarks, scores=context.config.reward is not None)
    return compare_adapter(model, trained, wanted.lora, folder, base, _spec(context, padded=False))


def _save_adapter(context: StepContext, trained: Mapping[str, Tensor], base: str, revision: str | None) -> list[str]:
    """Write the adapter's two files; the model that they are written from is given up again."""
    from posttrain_lib.checkpoint.adapters import save_adapter
    from posttrain_lib.models.lora import apply_lora

    adapted = apply_lora(load_base(context), context.config.model.lora)
    adapted.load_state_dict(trained, strict=False)
    return save_adapter(adapted, _spec(context), context.out / "adapter", base, revision)


def _is_made(model: ModelConfig) -> bool:
    """Whether the run began with a model that step ``inputs`` made, and not with ``model.path`` itself."""
    return model.from_scratch is not None or model.vocabulary.count() > 0


def _name_of_base(model: ModelConfig, source: Path) -> tuple[str, str | None]:
    """What a reader is to load the adapter on: a folder on this machine, or a hub id and its revision."""
    if model.path is None or _is_made(model) or Path(model.path).expanduser().exists():
        return str(source), None
    if "://" in model.path:
        return model.path, None
    name, _, revision = model.path.partition("@")
    return name, revision or None


def _prompts(context: StepContext, limit_tokens: int) -> list[list[int]]:
    """What the comparisons run on: held-out prompts; where none is short enough, or there are none, as of plain text,
    how held-out documents begin."""
    from posttrain_lib.data.token_store import TokenStore

    wanted = context.config.export.prompts
    rows = read_prompts(Path(context.inputs["prompts"].uri))
    fitting = [row["prompt_ids"] for row in rows if len(row["prompt_ids"]) <= limit_tokens]
    if fitting:
        return fitting[:wanted]
    store = TokenStore(Path(context.inputs["held_out"].uri))
    return [store.get(number)[0][:limit_tokens].tolist() for number in range(min(wanted, len(store)))]


def _same_tokenizer(context: StepContext, folder: Path, names: list[str]) -> Check:
    """Every tokenizer file of the input stands in the export byte for byte; a template that replaces one, too."""
    wanted = {name: Path(context.inputs["tokenizer"].uri) / name for name in names}
    if "chat_template" in context.inputs:
        wanted[TEMPLATE_FILE] = Path(context.inputs["chat_template"].uri)
    different = [name for name, path in wanted.items() if (folder / name).read_bytes() != path.read_bytes()]
    return Check(
        "tokenizer and template files byte-equal",
        not different,
        ", ".join(different) or f"{len(wanted)} files",
        "0 differences",
        "a changed tokenizer or template is a silent skew between training and serving",
    )


def _same_scores(context: StepContext, model: Decoder, folder: Path) -> list[Check]:
    """The exported classifier, padded as transformers does, scores as the trained model does."""
    import torch

    from posttrain_lib.checkpoint.verify_documents import Documents
    from posttrain_lib.checkpoint.verify_score import compare_scores

    prompts = _prompts(context, 1024)
    lengths = tuple(len(prompt) for prompt in prompts)
    return compare_scores(model, folder, Documents(torch.tensor([t for prompt in prompts for t in prompt]), lengths))


def _say_how_to_score(context: StepContext, folder: Path) -> None:
    from posttrain_lib.checkpoint.score_folder import write_score_readme
    from posttrain_lib.data.refusal import RefusedRow
    from posttrain_lib.schema.examples import Message

    tokenizer = load_tokenizer(context.config, context.inputs)
    try:
        rendered = tokenizer.render([Message("user", "A question"), Message("assistant", "An answer")])
    except RefusedRow as refusal:
        context.say(f"export: no README.md says how to score: a plain question and answer are refused ({refusal})")
        return
    if (remark := write_score_readme(folder, rendered[len(rendered.rstrip()) :])) is not None:
        context.say(f"export: {remark}")


def _same_in_vllm(context: StepContext, model: Decoder, folder: Path) -> list[Check]:
    from posttrain_lib.adapters import vllm_check, vllm_process
    from posttrain_lib.evaluation.generation import token_logprobs

    if not vllm_process.is_available():
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
    gap = _largest_gap(ours, answer)
    limit = settings.max_logprob_gap
    reason = "vLLM packs and fuses its linear layers, so sums are rounded in another order"
    return [
        Check(f"vLLM {answer.version} log-probs of prompts and completions", gap <= limit, gap, limit, reason),
        _same_greedy_text(context, model, prompts, answer),
    ]


def _largest_gap(ours: Sequence[Sequence[float]], answer: Answer) -> float:
    """Between log-probabilities of the same tokens; NaN where one of them is, which ``max`` alone passes over."""
    gaps = [
        abs(mine - theirs)
        for row, before, after in zip(ours, answer.prompt_logprobs, answer.logprobs, strict=True)
        for mine, theirs in zip(row, [*before, *after], strict=True)
    ]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _same_greedy_text(context: StepContext, model: Decoder, prompts: list[list[int]], answer: Answer) -> Check:
    """vLLM's greedy tokens are ours, or part where our two best tokens are closer than the log-prob bound."""
    from posttrain_lib.data.probes import stop_ids
    from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs

    tokenizer = load_tokenizer(context.config, context.inputs)
    limit, parted = context.config.export.max_logprob_gap, 0
    mine = greedy_generate(model, prompts, context.config.export.new_tokens, stop_ids(tokenizer))
    for prompt, ours, theirs in zip(prompts, mine, answer.token_ids, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:
            continue
        both = token_logprobs(model, [prompt + ours[: at + 1], prompt + theirs[: at + 1]])
        parted += not both[0][-1] - both[1][-1] <= 2 * limit  # each side may be off by the bound
    reason = "a different greedy token where ours is clearly ahead means different weights, template or positions"
    return Check("vLLM greedy text agrees", parted == 0, float(parted), 0.0, reason)


STEP: Step = Step("export", 1, "steps.export", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("export")
