"""Runs of flows as Metaflow's client tells of them, in plain values.

Runs of every user are seen. Which ones there are is Metaflow's matter: its datastore and metadata settings.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT

# As the flows have it; Metaflow reads it once, when imported.
os.environ.setdefault("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(PROJECT_ROOT))

from metaflow import Flow, Metaflow, Run, get_namespace, namespace
from metaflow.exception import MetaflowNotFound, MetaflowUnknownUser

#: how many of a flow's runs are looked through for one that an error can name
_LOOKED_THROUGH = 200
_NAMED = 5


@dataclass(frozen=True)
class FlowRun:
    """One run of a flow.

    Attributes:
        state: ``successful``; else what is known of why not, as ``failed in step train``.
        tags: those that people gave it, sorted.
        manifests: step -> manifest in plain form, of the last step that has them; empty where none has.
        config: the resolved run file in plain form; empty where the run did not come so far.
    """

    flow: str
    run: str
    state: str
    tags: tuple[str, ...]
    manifests: dict[str, dict[str, Any]]
    config: dict[str, Any]

    @property
    def successful(self) -> bool:
        """Whether it went through to its end."""
        return self.state == "successful"


def run_by_id(flow: str, run: str, *, where: str) -> FlowRun:
    """The run of that id, whatever became of it.

    Raises:
        ConfigError: no such flow or run; the nearest ids and the latest runs are named.
    """
    with every_user():
        runs = _runs(flow, where)
        try:
            found = Run(f"{flow}/{run}")
        except MetaflowNotFound:
            known = [each.id for each in islice(runs, _LOOKED_THROUGH)]
            near = difflib.get_close_matches(run, known, n=3, cutoff=0.7)
            raise ConfigError(
                f"{flow} has no such run",
                where=where,
                got=run,
                expected=f"one of its runs; the latest: {_told(flow, known)}",
                fix=f"did you mean {' or '.join(f'{flow}/{each}' for each in near)}?" if near else f"{flow}/latest",
            ) from None
        return _plain(flow, found)


def latest_run(flow: str, *, where: str, tag: str | None = None) -> FlowRun:
    """The latest successful run, of those with ``tag`` where it is given.

    Raises:
        ConfigError: there is none; what there is instead is named.
    """
    with every_user():
        known = []
        for run in _runs(flow, where, tag):
            if run.successful:
                return _plain(flow, run)
            known.append(run.id)
        if tag is None or known:
            raise ConfigError(
                f"no run of {flow}{f' with the tag {tag!r}' if tag is not None else ''} was successful",
                where=where,
                got=_told(flow, known),
                fix=f"look at what stopped it: python flows/{flow_file(flow)} logs <run id>/<step>",
            )
        tags = sorted({each for run in islice(_runs(flow, where), _LOOKED_THROUGH) for each in run.user_tags})
        raise ConfigError(
            f"no run of {flow} has this tag",
            where=where,
            got=tag,
            expected=f"one of: {', '.join(tags)}" if tags else "a tag; none of its runs has any",
            fix=f"python flows/{flow_file(flow)} tag add --run-id <run id> {tag}",
        )


def flows() -> tuple[str, ...]:
    """Names of all flows that have runs, sorted."""
    with every_user():
        return tuple(sorted(flow.id for flow in Metaflow()))


def tagged_runs() -> list[FlowRun]:
    """Every run of every flow that people gave a tag."""
    with every_user():
        return [_plain(flow.id, run) for flow in Metaflow() for run in flow if run.user_tags]


def resumed_runs(flow: str, run: str | None) -> tuple[str, ...]:
    """``run``, the run that it resumed, the one that that resumed, and so on; empty for None."""
    found: list[str] = []
    with every_user():
        while run is not None and run not in found:
            found.append(run)
            try:
                task = Run(f"{flow}/{run}")["start"].task
            except (MetaflowNotFound, KeyError):
                break  # its record is gone; of what it resumed nothing is known
            origin = None if task is None else task.metadata_dict.get("origin-run-id")
            run = None if origin in (None, "None") else origin
    return tuple(found)


def flow_file(flow: str) -> str:
    """The file in flows/ that a flow stands in."""
    return f"{flow.removesuffix('Flow').lower()}_flow.py"


@contextmanager
def every_user() -> Iterator[None]:
    """Runs of all users are seen inside."""
    try:
        before = get_namespace()
    except MetaflowUnknownUser:
        before = (
            None  # root, or a uid without a name, as in many containers: there are no runs of its own to go back to
        )
    namespace(None)
    try:
        yield
    finally:
        namespace(before)


def _runs(flow: str, where: str, *tags: str | None) -> Iterator[Any]:
    """A flow's runs, the latest first."""
    try:
        found = Flow(flow)
    except MetaflowNotFound:
        raise ConfigError(
            f"no run of {flow} is known here",
            where=where,
            got=f"Metaflow's records in {records()}",
            fix="start one, or point METAFLOW_DATASTORE_SYSROOT_LOCAL (or METAFLOW_SERVICE_URL) at the records that "
            "have it",
        ) from None
    runs = found.runs(*(tag for tag in tags if tag is not None))
    return iter(sorted(runs, key=lambda run: run.created_at, reverse=True))


def records() -> str:
    """Where Metaflow's records are read."""
    return os.environ.get("METAFLOW_SERVICE_URL") or os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]


def _told(flow: str, ids: list[str]) -> str:
    """The first few ids with what became of each."""
    told = [f"{run} ({_state(Run(f'{flow}/{run}'))})" for run in ids[:_NAMED]]
    return ", ".join(told) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "") or "no run"


def _plain(flow: str, run: Any) -> FlowRun:
    # Every step has those of the one before and its own. Which was the last, their times do not say: a resume copies
    # steps in any order.
    artifacts = [{artifact.id: artifact for artifact in step.task or ()} for step in run]
    manifests, config = (
        max((known[name].data or {} for known in artifacts if name in known), key=len, default={})
        for name in ("manifests", "run_config")
    )
    tags = tuple(sorted(run.user_tags))
    return FlowRun(flow, run.id, _state(run), tags, manifests, config)


def _state(run: Any) -> str:
    if run.successful:
        return "successful"
    for step in run:
        if any(task.metadata_dict.get("attempt_ok") == "False" and not task.successful for task in step):
            return f"failed in step {step.id}"
    return "not finished: it runs, or was stopped"
