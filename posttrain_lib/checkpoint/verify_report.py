"""What a verification found, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain_lib.schema.manifests import Check


@dataclass(frozen=True)
class Finding:
    """What one check found on one part of a model: ``value`` is to be at most ``limit``. ``module``: where, or what it
    is about (a parameter, a norm, a document's layer)."""

    name: str
    value: float
    limit: float
    reason: str
    module: str | None = None

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.value <= self.limit

    @property
    def share(self) -> float:
        """How much of the limit is taken up; infinite for NaN."""
        share = self.value / self.limit if self.limit > 0 else (0.0 if self.value == 0 else math.inf)
        return math.inf if math.isnan(share) else share


def merged(findings: list[Finding]) -> list[Check]:
    """One check of each name, in order: the first part that fails, else the one nearest to its limit."""
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    checks = []
    for name, found in by_name.items():
        worst = next((item for item in found if not item.passed), None) or max(found, key=lambda item: item.share)
        where = "" if worst.module is None else f"{worst.module}: "
        checks.append(Check(name, worst.passed, worst.value, worst.limit, where + worst.reason))
    return checks


@dataclass(frozen=True)
class ModuleDifference:
    """One module: largest absolute difference between ours and the reference's float64, and what was allowed."""

    name: str
    reference: str
    difference: float
    limit: float
    passed: bool
    detail: str | None = None


@dataclass(frozen=True)
class VerificationReport:
    """What was proven about a model folder.

    ``noise_floor`` is the reference's float32 against its float64, ``difference`` ours against its float64: largest
    absolute differences, over logits. ``modules`` is filled on failure: differences in order of execution up to the
    first wrong module.
    """

    folder: str
    family: str
    tier: str
    seed: int
    parameters: int
    documents: tuple[int, ...]
    noise_floor: float
    difference: float
    logit_scale: float
    checks: tuple[Check, ...]
    first_wrong_module: str | None = None
    detail: str | None = None
    modules: tuple[ModuleDifference, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    memory_estimate_bytes: int = 0

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; numbers that are not finite become strings."""
        return {**_jsonable(dataclasses.asdict(self)), "passed": self.passed}


def with_first_wrong(report: VerificationReport, modules: list[ModuleDifference]) -> VerificationReport:
    """The report with the first module that differs, and what was found about it."""
    wrong = next((module for module in modules if not module.passed), None)
    upto = modules if wrong is None else modules[: modules.index(wrong) + 1]
    return dataclasses.replace(
        report,
        modules=tuple(upto),
        first_wrong_module=None if wrong is None else wrong.name,
        detail=None if wrong is None else wrong.detail,
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
