"""Models by the name of what made them: a run of a flow, or a promoted model.

    SFTFlow/1795696944952819    that run's export
    SFTFlow/latest              the latest successful run's
    SFTFlow/tag:kind:chat       the latest successful one's that has the tag
    models/my-model             the current version of a promoted model; models/my-model@2: that one

Names are looked up once, before the first step: from then on the config has the folder as the section's ``path`` and
what was found as its ``origin``. A section has such names if it has these two fields. What later steps do goes by the
folder's content, never by its name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from posttrain_lib.config.base import Section
from posttrain_lib.config.origin import ModelOrigin
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.digests import write_atomically
from posttrain_lib.lineage.pointer import rollback_command
from posttrain_lib.lineage.store import MANIFEST, Store, disk_errors, first_damage, read_manifest
from posttrain_lib.schema.manifests import StepManifest
from steps.base import Say, say_line

if TYPE_CHECKING:
    from posttrain_lib.adapters.metaflow_runs import FlowRun

#: flows whose runs export a model
FLOWS = ("SFTFlow", "DPOFlow", "RewardFlow", "DistillFlow", "GRPOFlow")
_FLOW = re.compile(r"(?P<flow>\w+)/(?P<run>tag:.+|[^/]+)")
_PROMOTED = re.compile(r"models/(?P<name>[\w.-]+)(@(?P<version>\d+))?")
#: what a step may need a model for; a reward model's head is not one over the vocabulary
Kind = Literal["causal", "reward", "any"]
Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True)
class ResolvedModel:
    """A model that was found by name.

    Attributes:
        path: its Hugging Face folder.
        digest: sha256 of the folder's content, as it was published.
        lineage: what made it: flow, run, step, key (None of a folder that no run made), tags; promoted: name@version.
    """

    path: Path
    digest: str
    lineage: dict[str, Any]


@dataclass(frozen=True)
class RunNames:
    """The run that looks names up, as ``flow/id``, and those whose choice it keeps: its own earlier attempt, and what
    it resumes."""

    run: str
    keeps: tuple[str, ...] = ()


def is_name(reference: str, *, where: str) -> bool:
    """Whether a path is a name of these: neither a folder, nor a URL, nor a hub id.

    Raises:
        ConfigError: it is a flow's name misspelt, or a folder and a name at once.
    """
    flow, model = _FLOW.fullmatch(reference), _PROMOTED.fullmatch(reference)
    if model is not None:
        # A folder called models is common; only a name that was promoted makes it doubtful.
        if not Path(reference).exists():
            return True
        named = bool(promoted.versions_of(Store(), model["name"]))
    else:
        named = flow is not None and _is_flow(flow["flow"], where)
    if named and Path(reference).exists():
        raise ConfigError(
            "this is a folder here, and the name of a result too",
            where=where,
            got=reference,
            fix=f"write ./{reference} for the folder, or start from another place for the result",
        )
    return named


def resolve_model(reference: str, *, where: str = "model.path", needs: Kind = "causal") -> ResolvedModel:
    """The model that a name of a run or a promoted model stands for now, its folder checked for being whole.

    Raises:
        ConfigError: no such flow, run, tag or promoted model; a run that did not go through or exported nothing.
        ModelError: the folder is gone, damaged, or no model that is needed here.
    """
    model = _PROMOTED.fullmatch(reference)
    if model is not None:
        version = model["version"]
        entry = promoted.find(Store(), model["name"], None if version is None else int(version), where=where)
        again = f"{_again(entry.flow, entry.run)}; or go back to another version: {rollback_command(entry.name)}"
        _check_files(Path(entry.path), entry.files, where, reference, again)
        keys = ("flow", "run", "step", "key")
        made_by = {**{key: getattr(entry, key) for key in keys}, "tags": list(entry.tags), "promoted": entry.label}
        found = ResolvedModel(Path(entry.path), entry.digest, made_by)
    else:
        run = run_named(reference, where=where)
        if run is None:
            raise ConfigError(
                "this names neither a run nor a promoted model",
                where=where,
                got=reference,
                expected=f"<flow>/<run id>, <flow>/latest, <flow>/tag:<tag> ({', '.join(FLOWS)}) or models/<name>",
            )
        found = exported_by(run, where=where)
    kind = kind_of(found.path, where, reference)
    if kind == "reward" and needs == "causal":
        raise ModelError(
            "the result is no causal language model, which is needed here",
            where=where,
            got=f"{reference}: a reward model",
            expected="a model with a head over the vocabulary, as SFTFlow, DPOFlow and DistillFlow export",
        )
    if kind != needs == "reward":
        raise ModelError(
            "the result is no reward model, which is needed here",
            where=where,
            got=f"{reference}: a causal language model",
            expected="a model with a score head, as RewardFlow exports",
        )
    return found


def exported_by(run: FlowRun, *, where: str, must_be_through: bool = True) -> ResolvedModel:
    """What a run exported; raises as :func:`resolve_model`. A run that failed behind its export has one, too."""
    name = f"{run.flow}/{run.run}"
    if must_be_through and not run.successful:
        raise ConfigError(
            "the run did not go through",
            where=where,
            got=f"{name}: {run.state}",
            fix=f"let it end, or python flows/{_file(run.flow)} resume --origin-run-id {run.run}; "
            f"{run.flow}/latest is the latest successful one",
        )
    if "export" not in run.manifests:
        raise ConfigError(
            "the run exported no model",
            where=where,
            got=f"{name}: {run.state}; steps with a result: {', '.join(run.manifests) or 'none'}",
            expected="a run whose step export went through",
        )
    export = StepManifest.from_dict(run.manifests["export"])
    ref = export.outputs["hf"]
    check_published(Path(ref.uri).parent, export.key, where, name, _again(run.flow, run.run))
    lineage = {"flow": run.flow, "run": run.run, "step": "export", "key": export.key, "tags": list(run.tags)}
    return ResolvedModel(Path(ref.uri), ref.digest, lineage)


def run_named(reference: str, *, where: str) -> FlowRun | None:
    """The run that a name means; None where it is a promoted model's, or no name at all.

    Raises:
        ConfigError: no such flow, run or tag.
    """
    parts = _FLOW.fullmatch(reference)
    if parts is None or not _is_flow(parts["flow"], where):
        return None
    from posttrain_lib.adapters import metaflow_runs

    flow, run = parts["flow"], parts["run"]
    if run == "latest":
        return metaflow_runs.latest_run(flow, where=where)
    if run.startswith("tag:"):
        return metaflow_runs.latest_run(flow, where=where, tag=run.removeprefix("tag:"))
    return metaflow_runs.run_by_id(flow, run, where=where)


def check_published(folder: Path, key: str, where: str, name: str, again: str) -> None:
    """A step's published result is there, is the one of ``key``, and no file of it is missing or cut.

    Raises:
        ModelError: it is not.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError("the export is no longer in the store", where=where, got=f"{name}: {folder}", fix=again)
    problem = first_damage(folder) if manifest.key == key else f"the folder is the result of {manifest.key[:12]}"
    if problem is not None:
        raise ModelError(
            "the export is damaged", where=where, got=f"{name}: {folder}: {problem}", fix=f"remove it; {again}"
        )
    if os.access(folder / MANIFEST, os.W_OK):
        os.utime(folder / MANIFEST)  # last use, for the clean-up


def with_models_found(
    config: Config, *, run: RunNames | None = None, store: Store | None = None, say: Say = say_line
) -> Config:
    """The config with a folder for each name, and beside it what the name stood for.

    A run notes in the store what it found before it does anything else; a retry or a resume of it takes that, wherever
    ``latest`` is by then. Raises as :func:`resolve_model`.
    """
    raw, store = config.model_dump(mode="json"), store or Store()
    named = []
    for where, section in _sections(raw):
        if section["origin"] is not None:
            _check_there(ModelOrigin.model_validate(section["origin"]), where)
        elif section["path"] is not None and is_name(section["path"], where=where):
            named.append((where, section))
    if not named:
        return config
    noted = {} if run is None else _noted(store, run)
    for where, section in named:
        origin = noted.get(where)
        kept = origin is not None and origin.reference == section["path"]
        if origin is not None and kept:
            _check_there(origin, where)
        else:
            found = resolve_model(section["path"], where=where, needs=_needs(where, raw.get("recipe")))
            origin = _origin(section["path"], found)
        section.update(path=origin.path, origin=origin.model_dump(mode="json"))
        say(f"{where}: {told(origin)}{' (as the run found that began this one)' if kept else ''}")
    if run is not None:
        _note(store, run, {where: section["origin"] for where, section in named})
    return type(config).model_validate(raw)


def told(origin: ModelOrigin) -> str:
    """In a line: what was said, what it stands for, where that is."""
    asked = "" if origin.made_by() == origin.reference else f"{origin.reference} = "
    return f"{asked}{origin.made_by()} -> {origin.path}, digest {origin.digest[:12]}"


def _origin(reference: str, found: ResolvedModel) -> ModelOrigin:
    return ModelOrigin(reference=reference, path=str(found.path), digest=found.digest, **found.lineage)


def _check_there(origin: ModelOrigin, where: str) -> None:
    """What was found earlier, by an attempt that stopped or a run file that was written out, may be gone by now."""
    folder, again = Path(origin.path), _again(origin.flow, origin.run)
    if origin.key is not None:
        check_published(folder.parent, origin.key, where, origin.made_by(), again)
    elif not folder.is_dir():
        raise ModelError("the model's folder is gone", where=where, got=origin.path, fix=again)


def _sections(raw: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place of its path, section) of every section that a model may be named in."""
    if {"path", "origin"} <= raw.keys():
        yield f"{place}path", raw
    for name, value in raw.items():
        if isinstance(value, dict) and name != "origin":
            yield from _sections(value, f"{place}{name}.")
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, dict):
                yield from _sections(item, f"{place}{name}[{number}].")


def _needs(where: str, recipe: str | None) -> Kind:
    if where.endswith("reward_model.path"):
        return "reward"
    return "any" if where == "model.path" and recipe == "reward" else "causal"


def _note_file(store: Store, run: str) -> Path:
    return store.root / "names" / f"{run}.json"


def _noted(store: Store, run: RunNames) -> dict[str, ModelOrigin]:
    """What the nearest of the runs found whose choice is kept; empty where none did."""
    for earlier in run.keeps:
        path = _note_file(store, earlier)
        if path.is_file():
            raw = json.loads(path.read_text(encoding="utf-8"))
            return {where: ModelOrigin.model_validate(origin) for where, origin in raw.items()}
    return {}


def _note(store: Store, run: RunNames, found: dict[str, Any]) -> None:
    path = _note_file(store, run.run)
    with disk_errors("noting what a name stands for", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, indent=1))


def _is_flow(name: str, where: str) -> bool:
    """Whether the part before the slash is a flow of ours; the owners of hub ids are not."""
    if name in FLOWS:
        return True
    lower = {flow.lower(): flow for flow in FLOWS}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.85)
    if near or name in ("ConvertFlow", "ReproduceFlow"):
        raise ConfigError(
            "no flow of that name exports a model",
            where=where,
            got=name,
            expected=f"one of {', '.join(FLOWS)}",
            fix=f"did you mean {lower[near[0]]!r}?" if near else None,
        )
    return False


def _file(flow: str) -> str:
    from posttrain_lib.adapters.metaflow_runs import flow_file

    return flow_file(flow)


def _again(flow: str | None, run: str | None) -> str:
    """How to have an export again that the clean-up took."""
    if flow is None or run is None:
        return "put the folder back, or promote another one"
    return (
        f"python flows/{_file(flow)} resume start --origin-run-id {run} makes it again, as a new run; what is still in "
        "the store is reused"
    )


def _check_files(folder: Path, files: dict[str, int], where: str, name: str, again: str) -> None:
    """A promoted folder has the files it had, each of its size."""
    if not folder.is_dir():
        raise ModelError("the promoted model's folder is gone", where=where, got=f"{name}: {folder}", fix=again)
    now = promoted.sizes(folder)
    wrong = sorted(file for file in files.keys() | now.keys() if files.get(file) != now.get(file))
    if wrong:
        raise ModelError(
            "the promoted model's folder is not what it was",
            where=where,
            got=f"{name}: {folder / wrong[0]}: {now.get(wrong[0], 'no')} bytes",
            expected=f"{files.get(wrong[0], 'no')} bytes",
            fix=again,
        )


def kind_of(folder: Path, where: str, name: str) -> Literal["causal", "reward"]:
    """Which of the two a Hugging Face folder is, by the class that its config names.

    Raises:
        ModelError: it has no config.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError("no Hugging Face model: the folder has no config.json", where=where, got=f"{name}: {folder}")
    classes = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    return "reward" if any("Classification" in each for each in classes) else "causal"
