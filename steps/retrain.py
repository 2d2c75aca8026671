"""A scheduled retrain around the steps of a recipe: what is new, the run file that trains on it, and the decision.

The candidate starts from the current version of the model, so the step ``evaluate`` compares the two as it compares any
model before and after training: on the same held-out rows and the same suites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.evaluation import Gates
from posttrain_lib.config.load import build_config
from posttrain_lib.config.model import Vocabulary
from posttrain_lib.config.retrain import PROJECT_ROOT, RetrainConfig, build_retrain_config
from posttrain_lib.errors import DataError, ExportError, PosttrainError, VerificationError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.lineage.graph import Graph
from posttrain_lib.lineage.pointer import Entry, Pointer, TakenFile, TakenRows
from posttrain_lib.lineage.promoted import Promoted
from posttrain_lib.lineage.store import Store, published_place
from posttrain_lib.schema.manifests import StepManifest
from steps import landed, pipeline, report
from steps.base import Say, run_step, say_line
from steps.foresight import check_evaluation
from steps.promote import decision, user
from steps.recorded import lineage_of
from steps.start_from import RunNames, with_models_found

#: what speaks against a candidate; anything else is trouble of the run's, which a later one may not have
AGAINST_THE_CANDIDATE = (DataError, VerificationError, ExportError)
#: what they raise is about what they measure with, as a suite, a scorer, a harness that loads data: a candidate is
#: judged by their figures alone
_MEASURING = ("evaluate", "lm_eval")
#: its check is one of training; what a retrain demands instead, its gates say
_STATED_OTHERWISE = "evaluate"
#: it stops at a failed check unless the run file accepts that by name
_ACCEPTS = "check_serving"

_MENDED = (
    "The rows of a rejected candidate stay out. Mended ones go into a file of another name; "
    "or landing.rejected: offer_again takes them all again beside what is new."
)
#: characters of an error in the history
_MOST_TOLD = 300

Plain = dict[str, Any]


@dataclass(frozen=True)
class Due:
    """What there is to do: rows to take, beside the version to begin with; and what was said of the folder."""

    rows: TakenRows
    folder: str
    remarks: tuple[str, ...]

    @property
    def is_due(self) -> bool:
        """New rows, or no version yet."""
        return bool(self.rows.files) or self.rows.base is None


@dataclass(frozen=True)
class Refusal:
    """The step that a candidate did not come through, and why not; ``details`` are for people."""

    step: str
    what: str
    details: str


def resolve(raw: Any, overrides: str, branch: str | None) -> Plain:
    """The retrain's config in plain values after overrides. A run of a test branch (``--branch x``) keeps a model of
    its own up to date, ``<name>.x``: it must not move the pointer that others serve by."""
    where = "--set" if overrides.strip() else "--config"
    config = build_retrain_config(pipeline.plain_values(raw), where=where, overrides=[overrides])
    name = config.name if branch is None else f"{config.name}.{branch}"
    return config.model_copy(update={"name": name}).model_dump(mode="json")


def test_branch(current: Any) -> str | None:
    """Of Metaflow's ``current``: the branch of a run that was started with --branch, which is neither production nor
    the user's own."""
    return None if current.is_production or current.is_user_branch else str(current.branch_name)


def look(raw: Plain, say: Say = say_line) -> Due:
    """Find what is new since the retrains that count.

    Raises:
        DataError: as :func:`steps.landed.new_files`.
        StoreError: the pointer was changed by hand.
    """
    config, store = RetrainConfig.model_validate(raw), Store()
    current = promoted.pointer_of(store, config.name)
    taken = taken_files(store, config, current)
    folder = config.landing.path
    if folder is None:
        assert config.landing.generate is not None
        folder = landed.land_generated(store, config.name, config.landing.generate, taken)
    elif "://" not in folder:
        folder = str(Path(folder).expanduser().absolute())
    found = landed.new_files(folder, taken, config.landing.changed)
    for remark in found.remarks:
        say(f"landed: {remark}")
    begun = "there is no version yet" if current.current is None else f"version {current.current} is the current one"
    names = ", ".join(file.path for file in found.files) or "nothing"
    say(f"models/{config.name}: {begun}; {len(taken)} files were taken before; new: {names}")
    return Due(TakenRows(config.name, current.current, found.files), folder, found.remarks)


def taken_files(store: Store, config: RetrainConfig, current: Pointer) -> list[TakenFile]:
    """What earlier retrains took, in their order: those that led to the current version; where rows of rejected
    candidates and of versions rolled back stay out, these too."""
    ancestors, version = set(), current.current
    came_from = {entry.version: entry.before for entry in reversed(current.history) if entry.action == "promoted"}
    while version is not None and version not in ancestors:
        ancestors.add(version)
        version = came_from.get(version)
    counts = [
        entry.rows
        for entry in current.history
        if entry.rows is not None
        and (config.landing.rejected == "leave_out" or (entry.action == "promoted" and entry.version in ancestors))
    ]
    return [file for digest in counts for file in pointer.rows_of(store, config.name, digest).files]


def training_config(raw: Plain, due: Due, run: RunNames | None = None, say: Say = say_line) -> Plain:
    """The run file of this retrain in plain values: the rows are copied into the store first, the model is the current
    version, looked up. That later versions can be held to the retrain's gates is seen with the first one.

    Raises:
        ConfigError, DataError, ModelError: as the steps that look at them.
    """
    config, rows = RetrainConfig.model_validate(raw), due.rows
    plain, first = config.run.model_dump(mode="json"), rows.base is None
    sources = plain["data"]["sources"] if first or config.keep_sources else []
    if rows.files:
        wanted = landed.RowsToTake(due.folder, rows.files)
        took = run_step(landed.STEP, wanted, {}, say=say)  # type: ignore[arg-type]
        source = config.landing.model_dump(mode="json", include={"name", "format", "fields"})
        sources = [*sources, {**source, "path": took.outputs["rows"].uri}]
        if config.landing.mixture is not None:
            mixture = plain["train"]["mixture"] or {"sources": {}}
            part = {config.landing.name: config.landing.mixture.model_dump(mode="json")}
            plain["train"]["mixture"] = {**mixture, "sources": {**mixture["sources"], **part}}
    plain["data"]["sources"] = sources
    if (mixture := plain["train"]["mixture"]) is not None:
        names = {source["name"] for source in sources}
        mixture["sources"] = {name: part for name, part in mixture["sources"].items() if name in names}
    plain["evaluation"]["tasks"] += [_placed(task.model_dump(mode="json")) for task in config.suites]
    if not first:
        named = f"models/{config.name}@{rows.base}"
        # New tokens are in the vocabulary since the first version.
        grown = Vocabulary().model_dump(mode="json")
        plain["model"] = {**plain["model"], "path": named, "from_scratch": None, "origin": None, "vocabulary": grown}
        plain["evaluation"]["gates"] = Gates(metrics=config.gates).model_dump(mode="json")
        if plain["grpo"] is not None:  # a candidate would be compared with the warm start of the current version
            plain["grpo"]["warm_start"] = None
    found = with_models_found(build_config(RunConfig, plain, where="the retrain's run file"), run=run, say=say)
    if first:
        later = found.evaluation.model_copy(update={"gates": Gates(metrics=config.gates)})
        check_evaluation(found.model_copy(update={"evaluation": later}))
    return found.model_dump(mode="json")


def lineage(manifests: Mapping[str, Plain]) -> Graph:
    """What the results came from, back to raw rows and the first version's model."""
    return lineage_of(pipeline.load_manifests(manifests))


def before_training(run_config: Plain) -> list[str]:
    """The steps of the recipe before ``train``, in order."""
    names = [step.name for step in pipeline.chain(RunConfig.model_validate(run_config))]
    return names[: names.index("train")]


def attempt(
    names: Sequence[str],
    run_config: Plain,
    manifests: Mapping[str, Plain],
    *,
    reuse: bool,
    observe: Callable[[Any], None] = lambda _: None,
) -> tuple[dict[str, Plain], Refusal | None]:
    """Steps of the recipe, one after the other: the manifests with theirs added, and what spoke against the candidate.

    Raises:
        PosttrainError: of a kind that is no fault of the candidate's; then no decision is made, and its rows are the
            next run's.
    """
    made = dict(manifests)
    for name in names:
        try:
            made = pipeline.advance(name, run_config, made, reuse=reuse, observe=observe)
        except AGAINST_THE_CANDIDATE as error:
            if name in _MEASURING or (isinstance(error, DataError) and not _is_of_the_rows(error)):
                raise  # what could not be read, as of a store that does not answer, was not judged
            say_line(f"{name}: {error}")
            return made, Refusal(name, error.what, _shortened(error))
    return made, None


def _is_of_the_rows(error: DataError) -> bool:
    """Whether the rows are at fault, and not what they are read with: what was taken lies on a local disk, and what
    its reader then raises is about the content."""
    cause = error.__cause__
    if cause is None:
        return True
    taken = published_place(str(error.where).removeprefix("file://"))
    of_the_system = isinstance(cause, OSError) and cause.errno is not None  # Arrow raises OSErrors without a number
    return taken is not None and taken[1] == landed.STEP.name and not of_the_system


def decide(
    raw: Plain, rows: TakenRows, run_config: Plain, manifests: Mapping[str, Plain], refused: Refusal | None, run: str
) -> Entry:
    """Promote the candidate where everything holds, or keep the current version and say why.

    One decision is made of a candidate, whoever comes first: a retry, and a run that was started beside it, find that.
    A candidate is compared with the version that it began with; where another one is the current one by now, it is kept
    out, and its rows are the next retrain's.
    """
    config, store = RetrainConfig.model_validate(raw), Store()
    made = pipeline.load_manifests(manifests)
    gates, against = _verdict(config, run_config, made, refused)
    result = made["export"].key if refused is None else [refused.step, refused.what]
    stated = [raw["gates"], raw["run"]["evaluation"]["gates"]]
    candidate = digest_value({"rows": rows.digest(), "result": result, "gates": stated})
    digest = pointer.keep_rows(store, rows)
    with promoted.deciding(store, config.name) as before:
        earlier = _decided(before, candidate)
        if earlier is not None:
            return earlier
        entry = decision("rejected", "; ".join(against), gates=tuple(gates), run=run)
        entry = dataclasses.replace(entry, version=before.current, candidate=candidate, rows=digest)
        if before.current != rows.base:
            why = (
                f"it was compared with {_version(rows.base)}, and {_version(before.current)} is the current one by now"
            )
            entry = dataclasses.replace(entry, action="kept out", rows=None, why=f"{why}; its rows are offered again")
        elif not against:
            why = "; ".join(
                f"{gate['name']} {_figure(gate['value'])} ({gate['sense']} {gate['limit']})" for gate in gates
            )
            entry = dataclasses.replace(entry, action="promoted", why=f"{why}{_not_asked(config.run)}")
            promoted.record(store, _version_of(config.name, made["export"], run, entry), before, entry)
            return promoted.pointer_of(store, config.name).history[-1]
        return pointer.append(store, config.name, before, entry).history[-1]


def told(raw: Plain, entry: Entry | None) -> str:
    """What came of it, in a line."""
    number = promoted.pointer_of(Store(), raw["name"]).current
    current = _version(number)
    if entry is None:
        return f"models/{raw['name']}: no new rows; nothing to train, {current} stays the current one"
    kept = f", {current} stays the current one"
    if entry.action == "promoted":
        kept = "" if number == entry.version else f", {current} is the current one by now"
    moved = f" as version {entry.version}" if entry.action == "promoted" else ""
    stays_out = entry.action == "rejected" and raw["landing"]["rejected"] == "leave_out"
    mended = f"\n{_MENDED}" if stays_out else ""
    return f"models/{raw['name']}: {entry.action}{moved} by {entry.run}{kept}: {entry.why}{mended}"


def history(raw: Plain) -> tuple[Entry, ...]:
    """Every decision about the model, the first one first."""
    return promoted.pointer_of(Store(), raw["name"]).history


def _verdict(
    config: RetrainConfig, run_config: Plain, made: Mapping[str, StepManifest], refused: Refusal | None
) -> tuple[list[Plain], list[str]]:
    """Every gate with its value, and what does not hold, in words."""
    if refused is not None:
        return [], [f"{refused.step}: {refused.what}{refused.details}"]
    gates = report.gate_results(run_config, report.summarise(run_config, made))
    against = [
        f"gate on {gate['name']}: {_figure(gate['value'])}, stated {gate['sense']} {gate['limit']}"
        for gate in gates
        if not gate["holds"]
    ]
    for name, manifest in made.items():
        if not manifest.checks or name == _STATED_OTHERWISE:
            continue
        failed = [] if name == _ACCEPTS else [check.name for check in manifest.checks if not check.passed]
        passed = sum(check.passed for check in manifest.checks)
        limit = passed if name == _ACCEPTS else len(manifest.checks)
        gates.append(
            {"name": f"checks of {name}", "value": passed, "limit": limit, "sense": "at least", "holds": not failed}
        )
        against += [f"check of {name}: '{check}' failed" for check in failed]
    return gates, against


def _not_asked(run: RunConfig) -> str:
    """The proofs that the run file leaves out."""
    left_out = [
        *(["data.serving_check: off"] if run.data.serving_check == "off" else []),
        *(["export.verify_vllm: false"] if not run.export.verify_vllm else []),
    ]
    return f"; not asked for: {', '.join(left_out)}" if left_out else ""


def _decided(before: Pointer, candidate: str) -> Entry | None:
    """The decision that was made of this candidate; one that kept it out holds as long as no version changed since."""
    same = [entry for entry in before.history if entry.candidate == candidate]
    return next((e for e in reversed(same) if e.action != "kept out" or e.version == before.current), None)


def _version_of(name: str, export: StepManifest, run: str, entry: Entry) -> Promoted:
    flow, _, number = run.partition("/")
    hf = export.outputs["hf"]
    return Promoted(
        name=name,
        version=0,
        path=hf.uri,
        digest=hf.digest,
        files=promoted.sizes(Path(hf.uri)),
        promoted_at=entry.at,
        user=user(),
        flow=flow,
        run=number,
        step="export",
        key=export.key,
        checks=tuple(dataclasses.asdict(check) for check in export.checks),
        gates=entry.gates,
        note=None,
    )


def _shortened(error: PosttrainError) -> str:
    """What was got where, in a line; the run's log has the whole of it."""
    parts = " ".join(f"{part}" for part in (error.where, error.got) if part is not None).split()
    text = " ".join(parts)
    return f" ({text[:_MOST_TOLD]}{' ...' if len(text) > _MOST_TOLD else ''})" if text else ""


def _placed(task: Plain) -> Plain:
    """A suite's file below the project's folder, wherever that is on this machine."""
    file = task.get("file")
    return task if file is None or "://" in file else {**task, "file": str(PROJECT_ROOT / Path(file).expanduser())}


def _version(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def _figure(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
