"""The dry run: ``python -m steps.plan --config ...`` checks the config and prints what a run would do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from posttrain_lib.compute.plan import PlanError, make_plan, plan_lines, refuse_what_does_not_fit
from posttrain_lib.compute.plan_memory import weights_of
from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.config.load import dump_yaml
from posttrain_lib.config.model import FromScratch
from posttrain_lib.config.train import TrainConfig
from posttrain_lib.data.sources import files_of
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.models.families import get_family, read_hf_config, spec_from_config, spec_from_folder
from posttrain_lib.models.hf_spec import LACKS, HFSpec, check_workers, hf_spec_from_config
from posttrain_lib.models.spec import ModelSpec, check_prefixes, matmul_parameters, parameter_count
from steps import warm_start
from steps.foresight import COMPANION_FIELDS, check_model, check_names
from steps.pipeline import add_config_arguments, plain_errors
from steps.places import local_folder
from steps.start_from import told, with_models_found

_FLOAT32_BYTES = 4


def describe(config: RunConfig) -> str:
    """The resolved plan of a run, from the config, the model's config.json and the names that the config uses."""
    train = config.train
    slots = train.rows_per_step * train.row_tokens
    elsewhere = _data_elsewhere(config)
    check_names(_without(config, elsewhere))
    if warm_start.is_needed(config):
        warm = warm_start.sft_config(config, "the run's model")
        check_names(_without(warm, _data_elsewhere(warm)))
    _check_compiler(config)
    length = _length(train)
    lines = [
        f"plan of {config.name} ({config.recipe})",
        f"  data       {', '.join(source.name for source in config.data.sources)}; "
        f"examples up to {config.data.max_example_tokens} tokens ({config.data.over_length} longer ones)",
        *_mixture_lines(config),
        *(f"  not here   {name}: its files are not on this machine and were not checked" for name in elsewhere),
        *_training_lines(config, length),
        f"  optimiser  {train.optimizer.name}, lr {train.optimizer.lr:g}, {train.schedule.name} after "
        f"{train.schedule.warmup_steps} warm-up steps, {train.precision}",
        f"  evaluation every {_looks(config)} steps; checkpoint every {train.checkpoint.every_steps}, "
        f"keep {train.checkpoint.keep_last} and the best",
        *([f"  model      {told(config.model.origin)}"] if config.model.origin is not None else []),
        *_task_lines(config),
        *_model_lines(config),
        f"  export     {config.export.checkpoint} checkpoint, {config.export.dtype} weights, verified in transformers"
        f"{' and vLLM' if config.export.verify_vllm else ''}",
    ]
    if train.steps is not None and config.grpo is None:
        lines.insert(3, f"  tokens     at most {train.steps * slots:,} in all")
    return "\n".join(lines)


def _length(train: TrainConfig) -> str:
    if train.steps is not None:
        return f"{train.steps} steps"
    return "until the mixture ends," if train.epochs is None else f"{train.epochs:g} epochs"


def _training_lines(config: RunConfig, length: str) -> list[str]:
    train, compute, grpo = config.train, config.compute, config.grpo
    if grpo is None:
        slots = train.rows_per_step * train.row_tokens
        accumulation = train.rows_per_step // (train.micro_batch_rows * compute.mesh_spec().data_degree)
        return [
            f"  training   {length} x {slots:,} token slots ({train.rows_per_step} rows of {train.row_tokens}), "
            f"{compute.workers} device(s), {accumulation} micro-batch(es) each"
        ]
    ahead = "in turns with training" if not grpo.max_staleness else f"up to {grpo.max_staleness} batches ahead"
    batches = -(-(train.steps or 0) // grpo.updates_per_batch)
    graders = ", ".join(f"{term.shown_as} x {term.weight:g}" for term in grpo.rewards)
    lines = [
        f"  rollouts   {batches} batches of {grpo.prompts_per_step} prompts x {grpo.group_size} answers of up to "
        f"{grpo.rollout.max_new_tokens} tokens, engine {grpo.rollout.engine}, {ahead}",
        f"  reward     {graders}; advantages by {grpo.advantage}",
        f"  training   {length}, {grpo.updates_per_batch} a batch, rows of up to {train.row_tokens} tokens",
    ]
    if grpo.warm_start is not None:
        lines.insert(0, f"  warm start {_length(grpo.warm_start.train)} of supervised fine-tuning")
    return lines


def _looks(config: RunConfig) -> int:
    """Steps between two looks at held-out data."""
    return config.train.evaluate_every_steps if config.grpo is None else config.grpo.held_out.every_steps


def _mixture_lines(config: RunConfig) -> list[str]:
    mixture, data = config.train.mixture, config.data
    lines = []
    if mixture is not None:
        shares = []
        for source in data.sources:
            weight = mixture.sources[source.name].weight if source.name in mixture.sources else None
            shown = "its size" if weight is None else " -> ".join(f"{w:g} at step {s}" for s, w in _points(weight))
            own = mixture.sources[source.name].exhausted if source.name in mixture.sources else None
            shares.append(f"{source.name} {shown}, then {own or mixture.exhausted}")
        lines.append(f"  mixture    by {mixture.by}: {'; '.join(shares)}")
    if data.on_the_fly:
        sample = f"{data.on_the_fly_sample:,} of each source are checked beforehand"
        lines.append(f"  on the fly rows are tokenised while training; {sample}")
    return lines


def _task_lines(config: RunConfig) -> list[str]:
    """What is evaluated before and after training, and on the export."""
    asked = config.evaluation
    lines = [f"  tasks      {', '.join(task.title for task in asked.tasks)}, before and after"] if asked.tasks else []
    return lines + ([f"  lm_eval    {', '.join(asked.lm_eval.tasks)}, on the export"] if asked.lm_eval else [])


def _data_elsewhere(config: RunConfig) -> list[str]:
    """Sources whose local files are not on this machine, where the run itself is not either."""
    if config.compute.address is None:
        return []
    found = []
    for source in config.data.sources:
        if source.path is not None and "://" not in source.path:
            try:
                files_of(source.path)
            except DataError:
                found.append(source.name)
    return found


def _without(config: RunConfig, names: list[str]) -> RunConfig:
    """The config without these sources, for checks that would read them."""
    if not names:
        return config
    kept = tuple(source for source in config.data.sources if source.name not in names)
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": kept})})


def _points(weight: Any) -> list[tuple[int, float]]:
    return [(1, weight)] if isinstance(weight, int | float) else list(weight)


def _check_compiler(config: RunConfig) -> None:
    """Of this machine, where the workers are on it; on another each looks for itself before it loads anything.

    Raises:
        ConfigError: it cannot compile.
    """
    if config.train.compile == "none" or config.compute.address is not None:
        return
    from posttrain_lib.parallel.compilation import check_compiler
    from posttrain_lib.training.device import pick_device

    check_compiler(pick_device(config.compute.device, rank=0))


def _model_lines(config: RunConfig) -> list[str]:
    _check_folder(config)
    if config.model.backend == "hf":
        return _hf_lines(config)
    spec = _spec(config)
    if spec is None:
        return [f"  model      {_fetched(config)} (fetched when the run starts)"]
    _check_positions(spec, config)
    check_prefixes(spec.config, config.train.share_prefixes, config.data.max_example_tokens)
    body, _ = matmul_parameters(spec)
    plan = make_plan(spec, config, _beside(spec, config))
    lines = [
        f"  model      {spec.family}, {parameter_count(spec.config):,} parameters, {body:,} of them in the blocks",
        *_lora_lines(spec, config),
        *plan_lines(plan),
    ]
    try:
        refuse_what_does_not_fit(plan)
    except PlanError:
        print("\n".join(lines))  # the refusal is easier to read below what it is about
        raise
    return lines


def _beside(spec: ModelSpec, config: RunConfig) -> ModelSpec | None:
    """The frozen model that runs in the same step, if there is one and it is here."""
    companion = config.companion
    if companion is None or companion.kept != "live":
        return None
    if companion.path is None:
        return spec
    folder = local_folder(companion.path, COMPANION_FIELDS[config.recipe])
    return None if folder is None else spec_from_folder(folder)


def _fetched(config: RunConfig) -> str:
    scratch = config.model.from_scratch
    return str(config.model.path) if scratch is None else f"{scratch.family} with the tokenizer {scratch.tokenizer}"


def _check_folder(config: RunConfig) -> None:
    """A model and a tokenizer that are here already are held against each other, by their headers alone; so are those
    of a frozen model."""
    from posttrain_lib.checkpoint.folder_headers import check_folder_headers

    path, tokenizer = config.model.path, config.data.tokenizer
    own = None if tokenizer is None else local_folder(tokenizer, "data.tokenizer")
    folder = None if path is None or "://" in path else local_folder(path, "model.path")
    if folder is not None:
        check_model(config, folder, own)
    frozen = None if config.companion is None else config.companion.path
    if frozen is not None and (folder := local_folder(frozen, COMPANION_FIELDS[config.recipe])) is not None:
        check_folder_headers(folder, "native", folder)


def _lora_lines(spec: ModelSpec, config: RunConfig) -> list[str]:
    """Of the adapters, where they are what is trained."""
    lora = config.model.lora
    if lora is None:
        return []
    trained = sum(math.prod(shape) for _, shape, is_trained in weights_of(spec, lora) if is_trained)
    all_ = parameter_count(spec.config)
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    return [
        f"  adapters   {kind} of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}: {trained:,} "
        f"parameters are trained, {trained / all_:.2%} of the model's; the base is frozen in {lora.base_dtype}"
    ]


def _hf_lines(config: RunConfig) -> list[str]:
    """Of a model that runs as transformers' own class, with what that lacks."""
    check_workers(config.compute.workers)
    lacking = ["  backend    hf: transformers' own class. It lacks", *(f"             {lack}" for lack in LACKS)]
    raw = _hf_config(config)
    if raw is None:
        return [f"  model      {_fetched(config)} (fetched when the run starts)", *lacking]
    spec = hf_spec_from_config(raw, where="model")
    _check_positions(spec, config)
    states = 4 if config.train.optimizer.name == "adamw" else 3  # with weights and gradients
    held = spec.parameters * _FLOAT32_BYTES * states
    amount = f"{held / 2**30:.2f} GiB" if held >= 2**30 else f"{held / 2**20:.2f} MiB"
    return [
        f"  model      {spec.family} as {spec.architecture}, {spec.parameters:,} parameters",
        f"  memory     about {amount} for weights, gradients and optimiser; activations are not estimated",
        *lacking,
    ]


def _check_positions(spec: ModelSpec | HFSpec, config: RunConfig) -> None:
    positions = spec.config.max_position_embeddings
    if config.data.max_example_tokens > positions:
        raise ConfigError(
            "examples may be longer than the positions that the model is made for",
            where="data.max_example_tokens",
            got=config.data.max_example_tokens,
            expected=f"at most {positions} (max_position_embeddings)",
        )


def _hf_config(config: RunConfig) -> dict[str, Any] | None:
    """The model's config.json, or what it will be; None where it is not here yet."""
    scratch = config.model.from_scratch
    if scratch is not None:
        get_family(scratch.family, where="model.from_scratch.family")
        vocabulary = _scratch_vocabulary(scratch)
        made = {"model_type": scratch.family, "vocab_size": vocabulary, **scratch.architecture}
        return None if vocabulary is None else made
    path = str(config.model.path)
    folder = None if "://" in path else local_folder(path, "model.path")
    return None if folder is None else read_hf_config(folder)


def _spec(config: RunConfig) -> ModelSpec | None:
    raw, scratch = _hf_config(config), config.model.from_scratch
    if raw is None:
        return None
    if scratch is not None:
        return _grown(spec_from_config(raw, where="model.from_scratch.architecture"), raw["vocab_size"], config)
    path = Path(str(config.model.path)).expanduser() / "config.json"
    spec = spec_from_config(raw, where=str(path))
    if not config.model.vocabulary.count():
        return spec
    return _grown(spec, _vocabulary(path.parent, "model.path"), config)


def _grown(spec: ModelSpec, ids: int, config: RunConfig) -> ModelSpec:
    """The spec with the run's new tokens behind the tokenizer's ``ids``, as the step ``inputs`` will write it."""
    new = config.model.vocabulary.count()
    rows = max(spec.config.vocab_size, ids + new) if new else spec.config.vocab_size
    return dataclasses.replace(spec, config=dataclasses.replace(spec.config, vocab_size=rows))


def _scratch_vocabulary(scratch: FromScratch) -> int | None:
    """Ids of the tokenizer that a model is made for; None where it is to be fetched."""
    if scratch.tokenizer is None:
        return scratch.tokenizer_vocab_size
    folder = local_folder(scratch.tokenizer, "model.from_scratch.tokenizer")
    return None if folder is None else _vocabulary(folder)


def _vocabulary(folder: Path, where: str = "model.from_scratch.tokenizer") -> int:
    """Number of ids of a tokenizer folder, added tokens included."""
    path = folder.expanduser() / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            "the tokenizer folder is not there, or has no tokenizer.json",
            where=where,
            got=folder,
            fix="name a local Hugging Face folder with a tokenizer.json",
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    ids = (
        [*raw["model"]["vocab"].values()]
        if isinstance(raw["model"]["vocab"], dict)
        else range(len(raw["model"]["vocab"]))
    )
    return 1 + max([*ids, *(token["id"] for token in raw.get("added_tokens", []))])


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m steps.plan", description="Check a config and print the plan of its run."
    )
    add_config_arguments(parser)
    parser.add_argument("--resolved", action="store_true", help="also print the config with every default filled in")
    options = parser.parse_args(arguments)
    with plain_errors():
        config = with_models_found(load_run_config(options.config, options.set), say=lambda _: None)
        print(describe(config))
        if options.resolved:
            print(dump_yaml(config.model_dump(mode="json")), end="")


if __name__ == "__main__":
    main()
