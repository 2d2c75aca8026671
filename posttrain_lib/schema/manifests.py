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
class StepManifest:
    """The record of one step: what went in, what came out, and what could reproduce it.

    ``key`` is the content key (sha256 over ``key_parts``); two steps with equal keys are the same work.
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
    format_version: int = 1
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> StepManifest:
        """Inverse of :meth:`to_dict`."""
        fields = dict(raw)
        fields["inputs"] = {name: ArtifactRef(**ref) for name, ref in raw["inputs"].items()}
        fields["outputs"] = {name: ArtifactRef(**ref) for name, ref in raw["outputs"].items()}
        fields["checks"] = tuple(Check(**check) for check in raw["checks"])
        fields["notes"] = tuple(raw.get("notes", ()))
        return cls(**fields)
