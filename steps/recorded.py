"""What is recorded of a run: enough to do it again, and to say what it came from.

    recorded_run("SFTFlow/1795696944952819")

Config, manifests and code come from Metaflow's records, patches from the store. Results and inputs may be gone by then:
:func:`look` says of each whether it is still there.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, PosttrainError
from posttrain_lib.lineage.digests import FileDigests, digest_value, list_files
from posttrain_lib.lineage.graph import GONE, HERE, Graph, Raw, trace
from posttrain_lib.lineage.kept import read_record, record_file
from posttrain_lib.lineage.store import Store, check_manifest, published_place
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import landed, start_from
from steps.base import known_digests

#: flows whose runs leave results
FLOWS = (*start_from.FLOWS, "RetrainFlow", "ConvertFlow")
_RUN = re.compile(r"(?P<flow>\w*Flow)/(?P<run>tag:.+|[^/]+)")


@dataclass(frozen=True)
class Code:
    """The code that a run was made with.

    Attributes:
        commit: None where it ran outside of a git checkout.
        patch: digest of what the checkout had besides; None where it had nothing, or the patch is not known.
        patch_file: the patch, for ``git apply``; None where there is none or it is gone from the store.
        lacks: what of the code is not known, in words; empty where commit and patch are all of it.
    """

    commit: str | None
    patch: str | None
    patch_file: Path | None
    lacks: str


@dataclass(frozen=True)
class Recorded:
    """A run of a flow as it is recorded.

    Attributes:
        state: ``successful``, or what is known of why not.
        config: the resolved run file, plain.
        manifests: by step, in the order in which they ran; a reused one names the run that made it (``made_by``).
        code: of the step that was done last; all earlier results that the run took over have equal sources under it.
        environment, hardware: of that step.
        inputs: what came from outside of the run, by name: rows, models, tokenizers with their digests and places.
    """

    flow: str
    run: str
    state: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    manifests: dict[str, StepManifest]
    code: Code
    environment: dict[str, str]
    hardware: dict[str, str]
    inputs: dict[str, ArtifactRef]

    @property
    def name(self) -> str:
        """``flow/run``."""
        return f"{self.flow}/{self.run}"


def is_run(reference: str) -> bool:
    """Whether this is ``<flow>/<run id>``, ``<flow>/latest`` or ``<flow>/tag:<tag>``, of any flow."""
    return _RUN.fullmatch(reference) is not None


def nearest_name(reference: str) -> str | None:
    """Which run's name was meant, where a flow's name is misspelt or its run left out; None where no flow is near."""
    flow, _, run = reference.partition("/")
    spelt = {name.lower(): name for name in FLOWS}
    near = difflib.get_close_matches(flow.lower(), spelt, n=1, cutoff=0.75)
    return f"did you mean {spelt[near[0]]}/{run or 'latest'}?" if near else None


def _of_a_model(reference: str) -> str | None:
    known = f"python -m steps.lineage show {reference} tells the run that made it"
    return known if reference.startswith("models/") else None


def recorded_run(reference: str, *, store: Store | None = None, where: str = "run") -> Recorded:
    """The run of that name, whatever became of it (``latest`` and ``tag:`` mean successful ones).

    Raises:
        ConfigError: no such flow, run or tag, or no step of it left a result.
        StoreError: a manifest or a patch is not as it was written.
    """
    from posttrain_lib.adapters import metaflow_runs

    store, parts = store or Store(), _RUN.fullmatch(reference)
    if parts is None:
        raise ConfigError(
            "this names no run",
            where=where,
            got=reference,
            expected=f"<flow>/<run id>, <flow>/latest or <flow>/tag:<tag>, with <flow> one of {', '.join(FLOWS)}",
            fix=nearest_name(reference) or _of_a_model(reference),
        )
    flow, run = parts["flow"], parts["run"]
    if flow not in FLOWS and flow not in (known := metaflow_runs.flows()):
        raise ConfigError(
            "there is no such flow",
            where=where,
            got=reference,
            expected=f"one of {', '.join(dict.fromkeys([*FLOWS, *known]))}",
            fix=nearest_name(reference),
        )
    if run == "latest" or run.startswith("tag:"):
        tag = None if run == "latest" else run.removeprefix("tag:")
        found = metaflow_runs.latest_run(flow, where=where, tag=tag)
    else:
        found = metaflow_runs.run_by_id(flow, run, where=where)
    manifests = {step: StepManifest.from_dict(raw) for step, raw in found.manifests.items()}
    if not manifests:
        raise ConfigError(
            "no step of the run left a result",
            where=where,
            got=f"{flow}/{found.run}: {found.state}",
            expected="a run of which at least the first step went through",
        )
    for step, manifest in manifests.items():
        place = f"Metaflow's record of {flow}/{found.run}, step {step}"
        instead = f"look at what the store has: python -m steps.lineage show {step}/{manifest.key[:12]}"
        check_manifest(manifest, place, fix=instead)
    last = max(manifests.values(), key=lambda manifest: manifest.started_at)
    return Recorded(
        flow=flow,
        run=found.run,
        state=found.state,
        tags=found.tags,
        config=found.config,
        manifests=manifests,
        code=code_of(store, last),
        environment=last.environment,
        hardware=last.hardware,
        inputs=from_outside(manifests),
    )


def code_of(store: Store, manifest: StepManifest) -> Code:
    """The code that a step was done with.

    Raises:
        StoreError: the patch was changed after it was kept.
    """
    code = manifest.code
    patch, lacks = code.get("patch"), []
    file = None if patch is None or read_record(store, patch, "patch") is None else record_file(store, patch, "patch")
    if not code:
        lacks.append("the commit: it ran outside of a git checkout")
    elif patch is not None and file is None:
        lacks.append(f"the patch {patch[:12]}, which is gone from {record_file(store, patch, 'patch').parent}")
    elif patch is None and code.get("uncommitted_changes") == "yes":
        lacks.append(f"the uncommitted changes ({code.get('patch_not_kept', 'manifests of format 1 had none')})")
    if "patch_left_out" in code:
        lacks.append(f"untracked files too large for a patch: {code['patch_left_out']}")
    return Code(code.get("commit"), patch, file, "; ".join(lacks))


def from_outside(manifests: Mapping[str, StepManifest]) -> dict[str, ArtifactRef]:
    """Inputs of the steps that none of the steps made, by name; ``step.name`` where a name means two things.

    What is made is known by its digest: a reused step read the same content elsewhere.
    """
    made = {ref.digest for manifest in manifests.values() for ref in _made(manifest)}
    found: dict[str, ArtifactRef] = {}
    for step, manifest in manifests.items():
        for name, ref in manifest.inputs.items():
            if ref.digest in made or _is_below_made(ref, manifests):
                continue
            known = found.setdefault(name, ref)
            if known != dataclasses.replace(ref, kind=known.kind):
                found[f"{step}.{name}"] = ref
    return found


def _made(manifest: StepManifest) -> list[ArtifactRef]:
    """Outputs that are the step's own; others it passes on."""
    passed = {ref.uri for ref in manifest.inputs.values()}
    return [ref for ref in manifest.outputs.values() if ref.uri not in passed]


def _is_below_made(ref: ArtifactRef, manifests: Mapping[str, StepManifest]) -> bool:
    place = published_place(ref.uri)
    return place is not None and any(place[1:] == (each.step, each.key) for each in manifests.values())


def lineage_of(manifests: Mapping[str, StepManifest], store: Store | None = None) -> Graph:
    """What a run's results came from, up to what no step made, each looked at."""
    return trace(store or Store(), manifests.values(), look)


def look(ref: ArtifactRef, reader: StepManifest | None = None) -> Raw:
    """What has become of an input from outside. A large file is read once, then remembered.

    ``reader`` is the step that read it: of a landed file only what was there then belongs to the input.
    """
    digests, taken = known_digests(), None if reader is None else _bytes_taken(ref, reader)
    try:
        found = _now(ref, digests) if taken is None else _landed_now(ref, taken, digests)
    except PosttrainError as error:
        return Raw(f"cannot be read: {error.what}")
    digests.save()
    if found is None:
        return Raw(GONE)
    digest, files = found
    return Raw(HERE, files) if digest == ref.digest else Raw(f"changed: its digest is {digest[:12]} now")


def _bytes_taken(ref: ArtifactRef, reader: StepManifest) -> int | None:
    """How large a landed file was when the step ``take_rows`` read it, whose inputs have the digests of contents; None
    of any other step's input."""
    if reader.step != landed.STEP.name:
        return None
    files: Any = reader.config
    sizes = {path: size for path, _, size in files}
    return next(sizes[name] for name, each in reader.inputs.items() if each == ref)


def _landed_now(ref: ArtifactRef, taken: int, digests: FileDigests) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """As :func:`_now`, of a landed file. Lines may be added to it: its digest is that of its first ``taken`` bytes
    where these are what they were, else that of all."""
    from posttrain_lib.data.remote import file_system, patiently
    from posttrain_lib.data.sources import client_errors
    from posttrain_lib.data.sources import list_files as list_rows

    if "://" not in ref.uri and not Path(ref.uri).exists():
        return None
    ((file, version),) = list_rows(ref.uri, digests)
    filesystem, inner = file_system(file)

    with client_errors(file):
        size = patiently(file, lambda: filesystem.size(inner))
    first = partial(landed.digest_of_first, file)
    whole = digests.remote(file, size, version, lambda: first(size)) if "://" in ref.uri else version
    if whole == ref.digest or size <= taken:
        return whole, ()
    start = digests.remote(f"{file} up to byte {taken}", size, version, lambda: first(taken))
    return (start if start == ref.digest else whole), ()


def _now(ref: ArtifactRef, digests: FileDigests) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """Its digest now, as its kind is digested, and those of its files; None: it is not there."""
    from posttrain_lib.checkpoint.remote_folder import pinned_files
    from posttrain_lib.data.sources import digest_rows, names_of
    from posttrain_lib.data.sources import list_files as list_rows

    place = Path(ref.uri)
    if place.is_absolute() and not glob.glob(ref.uri):
        return None
    if ref.kind == "rows":
        files = list_rows(ref.uri, digests)
        names = names_of([file for file, _ in files])
        return digest_rows(ref.uri, digests), tuple(zip(names, (digest for _, digest in files), strict=True))
    if "://" in ref.uri:
        return digest_value(pinned_files(ref.uri)), ()
    if place.is_file():
        return digests.file(place), ()
    return digests.path(place), tuple(
        (file.relative_to(place).as_posix(), digests.file(file)) for file in list_files(place)
    )
