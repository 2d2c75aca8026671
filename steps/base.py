"""What every step shares: the content key, reuse, locking, atomic publishing, and what is said about it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import DataError, StoreError
from posttrain_lib.lineage.digests import FileDigests, digest_value
from posttrain_lib.lineage.environment import describe_hardware, environment_digest
from posttrain_lib.lineage.kept import keep_code, keep_environment, keep_sources
from posttrain_lib.lineage.source_digest import references_in, source_digest, user_code
from posttrain_lib.lineage.store import Store, default_root, disk_errors, published_place
from posttrain_lib.schema.manifests import ArtifactRef, Check, MadeBy, StepManifest
from steps import unfinished

Say = Callable[[str], None]
Manifests = Mapping[str, StepManifest]


_made_by: ContextVar[MadeBy | None] = ContextVar("made_by", default=None)


@contextlib.contextmanager
def results_of(run: MadeBy | None) -> Iterator[None]:
    """Manifests of steps that run inside say that this run made them."""
    token = _made_by.set(run)
    try:
        yield
    finally:
        _made_by.reset(token)


def say_line(text: str) -> None:
    """Print at once: Metaflow shows a task's lines as they come."""
    print(text, flush=True)


def known_digests() -> FileDigests:
    """File digests that the store remembers, so that a large file is read once."""
    return FileDigests(default_root() / "file-digests.json")


@dataclass(frozen=True)
class StepContext:
    """What a step's body may use. ``out`` is published when the body returns; ``work`` survives a crash."""

    config: RunConfig
    inputs: dict[str, ArtifactRef]
    out: Path
    work: Path
    say: Say
    observe: Callable[[Any], None]


@dataclass
class StepResult:
    """What a step's body returns.

    ``outputs`` maps a name to (path below ``out``, kind), or to a ready :class:`ArtifactRef` outside the store.
    """

    outputs: dict[str, tuple[str, str] | ArtifactRef]
    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Step:
    """A versioned step.

    ``module`` is walked for the source digest; ``settings`` picks the config values that decide the result, and
    nothing else, so that an unrelated edit of the run file costs nothing; ``inputs`` names the artifacts it reads.
    ``work_settings``: those of the settings under which interrupted work can go on; default: all of them.
    """

    name: str
    version: int
    module: str
    settings: Callable[[RunConfig], Any]
    inputs: Callable[[RunConfig, Manifests], dict[str, ArtifactRef]]
    body: Callable[[StepContext], StepResult]
    work_settings: Callable[[RunConfig], Any] | None = None


def content_key(step: Step, config: RunConfig, inputs: Mapping[str, ArtifactRef]) -> tuple[str, dict[str, str]]:
    """The key of a step's result and the parts it is made of."""
    settings = step.settings(config)
    own = user_code(references_in(settings))
    parts = {
        "version": str(step.version),
        "config": digest_value(settings),
        "inputs": digest_value({name: ref.digest for name, ref in inputs.items()}),
        "source": digest_value([source_digest(step.module), own]) if own else source_digest(step.module),
        "environment": environment_digest(),
    }
    return digest_value({"step": step.name, **parts}), parts


def run_step(
    step: Step,
    config: RunConfig,
    manifests: Manifests,
    *,
    store: Store | None = None,
    reuse: bool = True,
    say: Say = say_line,
    observe: Callable[[Any], None] = lambda _: None,
) -> StepManifest:
    """Return the step's result: the stored one if the same work was done before, else by doing it now.

    Equal work in two processes is done once: the second waits for the first. Whatever the body wrote before an
    exception is thrown away, save for its ``work`` folder.

    Raises:
        DataError: an input that lies outside the store is not what it was when the run found it.
    """
    store = store or Store()
    inputs = step.inputs(config, manifests)
    key, parts = content_key(step, config, inputs)
    with store.lock(step.name, key, say):
        found = store.find(step.name, key) if reuse else None
        if found is not None:
            say(f"{step.name}: reused {key[:12]} (same config, inputs, source and environment)")
            return dataclasses.replace(found, reused=True)
        _check_unchanged(inputs, manifests)
        say(f"{step.name}: running, {_reason(store, step, config, parts, reuse)}")
        work_key = key
        if step.work_settings is not None:
            work_key, _ = content_key(dataclasses.replace(step, settings=step.work_settings), config, inputs)
        # Work that other settings may go on with is not to be done by two at once.
        held = contextlib.nullcontext() if work_key == key else store.lock(f"{step.name}-work", work_key, say)
        with held, _reading(store, inputs):
            work = store.work_folder(step.name, work_key)
            if step.work_settings is not None:
                _tell_unfinished(step, config, inputs, work, say)
            manifest = _do(step, config, inputs, key, parts, store, work, say, observe, replace=not reuse)
    say(f"{step.name}: done in {manifest.seconds:.1f} s, stored as {key[:12]}{_tail(manifest)}")
    return manifest


def _do(
    step: Step,
    config: RunConfig,
    inputs: dict[str, ArtifactRef],
    key: str,
    parts: dict[str, str],
    store: Store,
    work: Path,
    say: Say,
    observe: Callable[[Any], None],
    *,
    replace: bool,
) -> StepManifest:
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    # Now, not when the body is through: files may be edited while it runs.
    code, environment = keep_code(store), keep_environment(store)
    keep_sources(store, parts["source"], step.module, references_in(step.settings(config)))
    if replace and work.exists():
        _remove_tree(work)  # the caller asked for the work to be done afresh
    with store.scratch() as out:
        with disk_errors(f"step {step.name}", out):
            result = step.body(StepContext(config, inputs, out, work, say, observe))
        digests = FileDigests()
        target = store.result_folder(step.name, key)
        outputs = {
            name: ref
            if isinstance(ref, ArtifactRef)
            else ArtifactRef(uri=str(target / ref[0]), kind=ref[1], digest=digests.path(out / ref[0]))
            for name, ref in result.outputs.items()
        }
        manifest = StepManifest(
            step=step.name,
            version=step.version,
            key=key,
            key_parts=parts,
            config=step.settings(config),
            inputs=inputs,
            outputs=outputs,
            checks=tuple(result.checks),
            metrics=result.metrics,
            environment=environment,
            code=code,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - clock,
            notes=(result.summary,) if result.summary else (),
            hardware=describe_hardware(),
            made_by=_made_by.get(),
        )
        manifest = store.publish(out, manifest)
    if work.exists():
        _remove_tree(work)
    return manifest


def _check_unchanged(inputs: Mapping[str, ArtifactRef], manifests: Manifests) -> None:
    """What an earlier step found outside the store and handed on is what it was then: a resumed run may find it edited,
    and the result would stand under the key of the old content. Rows are large, and looked at by those who read them.
    """
    known = known_digests()
    handed_on = [ref for manifest in manifests.values() for ref in manifest.outputs.values()]
    for name, ref in inputs.items():
        outside = "://" not in ref.uri and published_place(ref.uri) is None and ref in handed_on
        if outside and ref.kind != "rows" and known.path(Path(ref.uri)) != ref.digest:
            raise DataError(
                f"the {name.replace('_', ' ')} is not what it was when the run started",
                where=ref.uri,
                got=None if Path(ref.uri).exists() else "nothing is there",
                expected=f"content {ref.digest[:12]}",
                fix="start a new run (or `resume start`), so that the results are kept under the new content",
            )


@contextlib.contextmanager
def _reading(store: Store, inputs: Mapping[str, ArtifactRef]) -> Iterator[None]:
    """Hold the results that are read, so that no clean-up takes them.

    Raises:
        StoreError: one is gone, as behind a resume of a run whose results were cleaned away.
    """
    places = {name: place for name, ref in inputs.items() if (place := published_place(ref.uri)) is not None}
    with store.reading({(step, key) for _, step, key in places.values()}):
        for name, (folder, step, _) in places.items():
            if not Path(inputs[name].uri).exists():
                raise StoreError(
                    f"the input {name}, a result of {step}, is gone from the store",
                    where=folder,
                    fix=f"start the run again, or resume it from step {step}: what is still there is reused",
                )
        yield


def _remove_tree(folder: Path) -> None:
    with disk_errors("removing a folder", folder):
        shutil.rmtree(folder)


def _tell_unfinished(step: Step, config: RunConfig, inputs: Mapping[str, ArtifactRef], work: Path, say: Say) -> None:
    """What an interrupted attempt left under other settings would otherwise be lost without a word."""
    assert step.work_settings is not None
    settings = {**step.work_settings(config), "inputs": {name: ref.digest[:12] for name, ref in inputs.items()}}
    if (line := unfinished.left_behind(work, settings)) is not None:
        say(f"{step.name}: {line}")
    with disk_errors("noting what is begun", work):
        unfinished.record(work, settings)


def _reason(store: Store, step: Step, config: RunConfig, parts: dict[str, str], reuse: bool) -> str:
    """Why the stored results do not serve."""
    if not reuse:
        return "because reuse is off"
    made_by = _made_by.get()
    newest = store.newest(step.name, None if made_by is None else made_by.flow)
    if newest is None:
        return "no earlier result in the store"
    changed = [name for name, value in parts.items() if newest.key_parts.get(name) != value]
    line = f"{' and '.join(changed) or 'nothing'} changed since {newest.key[:12]}"
    line += "" if newest.made_by is None else f" of {newest.made_by.name}"
    if "config" in changed:
        settings = json.loads(json.dumps(step.settings(config), default=str))
        line += f" ({unfinished.told(unfinished.differences(newest.config, settings))})"
    return line


def _tail(manifest: StepManifest) -> str:
    return "".join(f"\n{manifest.step}: {note}" for note in manifest.notes)
