"""What a step leaves behind: references to files, never the files themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ArtifactRef:
    """A published folder or file: where it is and the sha256 of its content."""

    uri: str
    kind: str
    digest: str


@dataclass(frozen=True)
class Check:
    """One thing a step proved about its result."""

    name: str
    passed: bool
    value: float | str | None = None
    limit: float | str | None = None
    reason: str = ""


@dataclass(frozen=True)
class MadeBy:
    """The task of a flow that a result was made in; ``origin`` is the run that it resumed, where it did."""

    flow: str
    run: str
    step: str
    user: str
    origin: str | None = None

    @property
    def name(self) -> str:
        """``flow/run``, as commands take it."""
        return f"{self.flow}/{self.run}"


#: what :class:`StepManifest` is written as; 1 had neither hardware of its own, nor a run, nor a digest
FORMAT_VERSION = 2
_HARDWARE_OF_FORMAT_1 = ("machine", "cpu", "cores")


@dataclass(frozen=True)
class StepManifest:
    """The record of one step: what went in, what came out, and what could reproduce it.

    ``key`` is the content key (sha256 over ``key_parts``); two steps with equal keys are the same work.

    Attributes:
        environment: lock and versions; ``packages`` is the digest of the list of all of them (lineage/kept.py).
        code: commit and whether the tree differed from it; ``patch`` is the digest of how (lineage/patch.py).
        hardware: of the machine that ran the step; ranks on other machines say theirs in the training's metrics.
        made_by: the run that did the work; None outside of flows. A reused result keeps the run that made it.
        digest: sha256 of all the rest but ``reused``; empty before publishing and in format 1.
    """

    step: str
    version: int
    key: str
    key_parts: dict[str, str]
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    outputs: dict[str, ArtifactRef]
    checks: tuple[Check, ...]
    metrics: dict[str, Any]
    environment: dict[str, str]
    code: dict[str, str]
    started_at: str
    seconds: float
    reused: bool = False
    format_version: int = FORMAT_VERSION
    notes: tuple[str, ...] = field(default=())
    hardware: dict[str, str] = field(default_factory=dict)
    made_by: MadeBy | None = None
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> StepManifest:
        """Inverse of :meth:`to_dict`; takes every format up to :data:`FORMAT_VERSION`."""
        fields = dict(raw)
        if "hardware" not in raw:
            environment = dict(raw["environment"])
            fields["hardware"] = {name: environment.pop(name) for name in _HARDWARE_OF_FORMAT_1 if name in environment}
            fields["environment"] = environment
        if raw.get("made_by") is not None:
            fields["made_by"] = MadeBy(**raw["made_by"])
        fields["inputs"] = {name: ArtifactRef(**ref) for name, ref in raw["inputs"].items()}
        fields["outputs"] = {name: ArtifactRef(**ref) for name, ref in raw["outputs"].items()}
        fields["checks"] = tuple(Check(**check) for check in raw["checks"])
        fields["notes"] = tuple(raw.get("notes", ()))
        return cls(**fields)
