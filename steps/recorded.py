"""What is recorded of a run: enough to do it again, and to say what it came from.

    recorded_run("SFTFlow/1795696944952819")

Config, manifests and code come from Metaflow's records, patches from the store. Results and inputs may be gone by then:
:func:`look` says of each whether it is still there.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, PosttrainError
from posttrain_lib.lineage.digests import FileDigests, digest_value, list_files
from posttrain_lib.lineage.graph import GONE, HERE, Graph, Raw, trace
from posttrain_lib.lineage.kept import read_record, record_file
from posttrain_lib.lineage.store import Store, check_manifest, published_place
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps.base import known_digests

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
            "this names no run", where=where, got=reference, expected="<flow>/<run id>, as SFTFlow/latest"
        )
    flow, run = parts["flow"], parts["run"]
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


def look(ref: ArtifactRef) -> Raw:
    """What has become of an input from outside. A large file is read once, then remembered."""
    digests = known_digests()
    try:
        found = _now(ref, digests)
    except PosttrainError as error:
        return Raw(f"cannot be read: {error.what}")
    digests.save()
    if found is None:
        return Raw(GONE)
    digest, files = found
    return Raw(HERE, files) if digest == ref.digest else Raw(f"changed: its digest is {digest[:12]} now")


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
