"""Step ``inputs``: everything the run starts from, made or found, with its digest.

What the run file asks to be generated (rows, tokenizer, model) is made here, so that the embedded default enters the
rest of the pipeline as files, the same way as downloaded data and a downloaded model do. So is a model with new tokens:
all later steps see a plain folder, its tokenizer grown with it. Of a model in an object store the folder has the small
files and a pointer; its weights stay there, and each later step reads what it needs of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.data import Source
from posttrain_lib.config.evaluation import WinRateTask
from posttrain_lib.config.origin import ModelOrigin
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.lineage.pointer import rollback_command
from posttrain_lib.lineage.store import default_root, disk_errors
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult, known_digests
from steps.foresight import COMPANION_FIELDS, check_evaluation, check_model, check_start
from steps.places import HUB_ID, local_folder


def settings(config: RunConfig) -> dict[str, Any]:
    """What is generated, and the names of what is found (their content enters the key by digest)."""
    return {
        "sources": [{"name": s.name, "generate": _generated(s), "path": s.path} for s in config.data.sources],
        "model": {
            "path": config.model.path,
            "origin": _plain(config.model.origin),
            "from_scratch": _plain(config.model.from_scratch),
        },
        "vocabulary": config.model.vocabulary.model_dump(mode="json", exclude={"pad_to_multiple_of"}),
        "companion": None if config.companion is None else [config.companion.path, _plain(config.companion.origin)],
        "tokenizer": config.data.tokenizer,
        "chat_template": config.data.chat_template,
    }


def _generated(source: Source) -> Any:
    """What decides a source's generated rows; of events the format says no more than ``pairs``."""
    plain = _plain(source.generate)
    return plain if plain is None or plain["of"] == "events" else {**plain, "format": source.format}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """References to what already exists: data files, model and tokenizer folders, the template.

    What is cheap to look at comes first: rows that are not there before a model is fetched, a model folder's headers
    before anything is read whole for its digest.
    """
    from posttrain_lib.data.sources import digest_rows, pinned

    if _trains(config):
        check_start(config)
        check_evaluation(config)
    rows = {source.name: pinned(source.path) for source in config.data.sources if source.path is not None}
    folders = _local_folders(config)
    digests = known_digests()
    found: dict[str, ArtifactRef] = {}
    for name, uri in rows.items():
        found[f"source:{name}"] = ArtifactRef(uri=uri, kind="rows", digest=digest_rows(uri, digests))
    path = config.model.path
    if path is not None and "model" not in folders:
        found["model"] = _stored_model(path)
    for name, local in folders.items():
        found[name] = ArtifactRef(uri=str(local), kind=name, digest=digests.path(local))
    if config.model.origin is not None:
        _check_unchanged(config.model.origin, found["model"])
    if config.companion is not None and config.companion.origin is not None:
        _check_unchanged(config.companion.origin, found["companion"])
    if _trains(config):
        _check_judges(config, folders)
    with disk_errors("remembering file digests", default_root()):
        digests.save()
    return found


def body(context: StepContext) -> StepResult:
    """Generate what is to be generated and pass on the references of the rest."""
    config, out = context.config, context.out
    outputs: dict[str, tuple[str, str] | ArtifactRef] = {}
    generated: list[Path] = []
    for source in config.data.sources:
        if source.generate is None:
            outputs[f"source:{source.name}"] = context.inputs[f"source:{source.name}"]
            continue
        path = out / "rows" / f"{source.name}.jsonl"
        _write_rows(path, source)
        generated.append(path)
        outputs[f"source:{source.name}"] = (path.relative_to(out).as_posix(), "rows")
    outputs["model"] = _model(context, generated)
    if "companion" in context.inputs:
        outputs["companion"] = context.inputs["companion"]
    outputs["tokenizer"] = context.inputs.get("tokenizer", outputs["model"])
    if "companion" in context.inputs:
        _check_companion(context, outputs["tokenizer"])
    if "chat_template" in context.inputs:
        outputs["chat_template"] = context.inputs["chat_template"]
    origin = config.model.origin
    metrics = {} if origin is None else {"model_origin": origin.model_dump(mode="json")}
    return StepResult(outputs, metrics=metrics, summary=_describe(context))


def _check_companion(context: StepContext, tokenizer: tuple[str, str] | ArtifactRef) -> None:
    """The frozen model means by an id what the trained one means."""
    from posttrain_lib.data.shared_ids import check_shared_ids

    own = tokenizer.uri if isinstance(tokenizer, ArtifactRef) else context.out / tokenizer[0]
    where = COMPANION_FIELDS[context.config.recipe]
    check_shared_ids(own, context.inputs["companion"].uri, where=where)


def _model(context: StepContext, generated: list[Path]) -> tuple[str, str] | ArtifactRef:
    """The model folder that all later steps see: found, made, or a copy of either with new tokens."""
    new_tokens = context.config.model.vocabulary.count()
    if context.config.model.from_scratch is None:
        found = context.inputs["model"]
        if not _is_in_store(found):
            if not new_tokens:
                return found
            _grow(context, Path(found.uri))
        elif new_tokens:
            with tempfile.TemporaryDirectory(dir=context.out) as folder:
                _fetch_stored(found, Path(folder))
                _grow(context, Path(folder))
        else:
            _fetch_stored(found, context.out / "model")
            own = context.inputs.get("tokenizer")
            if _trains(context.config):
                check_model(context.config, context.out / "model", None if own is None else own.uri)
    elif new_tokens:
        with tempfile.TemporaryDirectory(dir=context.out) as folder:
            _write_scratch(context, generated, Path(folder))
            _grow(context, Path(folder))
    else:
        _write_scratch(context, generated, context.out / "model")
    return "model", "hf_model"


def _grow(context: StepContext, source: Path) -> None:
    from posttrain_lib.models.growth import grow_folder
    from posttrain_lib.models.growth_tokenizer import NewToken

    wanted = context.config.model.vocabulary
    grown = grow_folder(
        source,
        context.out / "model",
        [NewToken(token.token, token.special, token.description) for token in wanted.new_tokens()],
        initialise=wanted.initialise,
        noise=wanted.noise,
        seed=wanted.seed,
    )
    context.say(
        f"inputs: {grown.count} new tokens have ids from {grown.first_id} on; the vocabulary went from "
        f"{grown.vocab_size_before} to {grown.vocab_size} rows"
    )


def _write_scratch(context: StepContext, generated: list[Path], out: Path) -> None:
    from posttrain_lib.embedded.tokenizer import build_tokenizer
    from posttrain_lib.models.scratch import write_scratch_model

    scratch = context.config.model.from_scratch
    assert scratch is not None
    if scratch.tokenizer is not None:
        tokenizer = Path(context.inputs["scratch_tokenizer"].uri)
    else:
        tokenizer = context.out / "tokenizer"
        build_tokenizer(_texts(generated), scratch.tokenizer_vocab_size, tokenizer)
    write_scratch_model(scratch.family, scratch.architecture, tokenizer, scratch.seed, out)


def _write_rows(path: Path, source: Source) -> None:
    from posttrain_lib.embedded.conversations import generate_rows
    from posttrain_lib.embedded.lookups import generate_demonstrations, generate_questions
    from posttrain_lib.embedded.pairs import generate_pairs

    generate = source.generate
    assert generate is not None
    makers = {
        ("events", "messages"): generate_rows,
        ("events", "preference"): generate_pairs,
        ("lookups", "messages"): generate_demonstrations,
        ("lookups", "prompts"): generate_questions,
    }
    make = makers[generate.of, source.format]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        for row in make(generate.rows, generate.seed):
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as handle:
            for line in handle:
                row = json.loads(line)
                if isinstance(row.get("prompt"), str):
                    yield from (row["prompt"], row["answer"])
                    continue
                messages = row.get("messages") or [*row["prompt"], *row["chosen"], *row["rejected"]]
                yield from (message["content"] for message in messages)


def _check_judges(config: RunConfig, folders: Mapping[str, Path]) -> None:
    """Models that evaluation tasks name: as they were published, and of the trained model's tokenizer where that is
    there already."""
    from steps.evaluate import check_judges, tasks_of

    for task in config.evaluation.tasks:
        judge = task.reward_model if isinstance(task, WinRateTask) else None
        if judge is not None and judge.origin is not None:
            digest = known_digests().path(Path(judge.path))
            _check_unchanged(judge.origin, ArtifactRef(uri=judge.path, kind="model", digest=digest))
    own = folders.get("tokenizer", folders.get("model"))
    if own is not None:
        check_judges(tasks_of(config), own)


def _check_unchanged(origin: ModelOrigin, found: ArtifactRef) -> None:
    """A folder that was named by what made it is still what that made.

    Raises:
        ModelError: some file of it was changed.
    """
    if found.digest != origin.digest:
        otherwise = "name the folder itself as model.path"
        if origin.promoted is not None:
            otherwise = f"go back to another version: {rollback_command(origin.promoted.partition('@')[0])}"
        raise ModelError(
            "the model's folder was changed after it was published",
            where=found.uri,
            got=f"digest {found.digest[:12]}",
            expected=f"{origin.digest[:12]}, which {origin.made_by()} has",
            fix=f"make it again, or {otherwise}",
        )


def _stored_model(url: str) -> ArtifactRef:
    """A model in an object store: what it is, is what the store tells of its files' versions."""
    from posttrain_lib.checkpoint.remote_folder import pinned_files

    return ArtifactRef(uri=url, kind="model", digest=digest_value(pinned_files(url)))


def _is_in_store(found: ArtifactRef) -> bool:
    return "://" in found.uri


def _fetch_stored(found: ArtifactRef, out: Path) -> None:
    """The model's folder without its weights, if it is still the one that the step's key was made of."""
    from posttrain_lib.checkpoint.remote_folder import fetch_folder, pinned_files

    pins = pinned_files(found.uri)
    if digest_value(pins) != found.digest:
        raise ModelError(
            "the model was replaced in its store while the run started", where=found.uri, fix="start the run again"
        )
    fetch_folder(found.uri, pins, out)


def _trains(config: RunConfig) -> bool:
    """A conversion has no rows, and takes architectures without a definition: its own steps judge the model."""
    return config.recipe != "convert"


def _local_folders(config: RunConfig) -> dict[str, Path]:
    """Name -> folder or file on this machine, checked; of a model in a store nothing. Hub ids are fetched into the
    hub's own cache first."""
    from posttrain_lib.data.chat_tokenizer import read_template

    scratch, template = config.model.from_scratch, config.data.chat_template
    wanted = {
        "model": (config.model.path, "model.path"),
        "companion": (config.companion.path if config.companion else None, COMPANION_FIELDS.get(config.recipe, "")),
        "tokenizer": (config.data.tokenizer, "data.tokenizer"),
        "scratch_tokenizer": (scratch.tokenizer if scratch else None, "model.from_scratch.tokenizer"),
    }
    found: dict[str, Path] = {}
    for name, (path, field) in wanted.items():
        if path is not None and not (name == "model" and "://" in path):
            found[name] = (local_folder(path, field) or _fetch_from_hub(path, field)).resolve()
    if template is not None:
        read_template(template)
        found["chat_template"] = Path(template).expanduser().resolve()
    if "model" in found and _trains(config):
        check_model(config, found["model"], found.get("tokenizer"))
    return found


def _fetch_from_hub(name: str, field: str) -> Path:
    found = HUB_ID.fullmatch(name)
    assert found is not None
    import huggingface_hub

    from posttrain_lib.data.remote import patiently

    def fetch() -> str:
        revision = found["revision"]
        if not huggingface_hub.is_offline_mode():
            # Asked first: where the hub fails, snapshot_download takes an older snapshot of its cache for the newest.
            revision = huggingface_hub.HfApi().model_info(found["name"], revision=revision).sha
        return huggingface_hub.snapshot_download(found["name"], revision=revision)

    try:
        return Path(patiently(name, fetch))
    except Exception as error:  # huggingface_hub lets those of its HTTP client through
        raise ConfigError(
            "neither a local path nor a hub id that can be fetched",
            where=field,
            got=f"{name} ({type(error).__name__}: {' '.join(str(error).split())})",
            fix="check the spelling and the network, set HF_TOKEN for a private one, or name a local folder",
        ) from error


def _describe(context: StepContext) -> str:
    made = [source.name for source in context.config.data.sources if source.generate is not None]
    parts = [f"generated rows for {', '.join(made)}"] if made else []
    if context.config.model.origin is not None:
        parts.append(f"the model is that of {context.config.model.origin.made_by()}")
    if context.config.model.from_scratch is not None:
        parts.append("wrote a new model as a Hugging Face folder")
    if added := context.config.model.vocabulary.count():
        parts.append(f"gave the model {added} new tokens")
    return "; ".join(parts) or "every input was found"


def _plain(section: Any) -> Any:
    return None if section is None else section.model_dump(mode="json")


STEP: Step = Step("inputs", 1, "steps.inputs", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("inputs")
