"""The file of a scheduled retrain: the model, where new rows land, and what a new version must prove."""

from __future__ import annotations

import difflib
import zoneinfo
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain_lib.config.base import Section
from posttrain_lib.config.cron import check_cron
from posttrain_lib.config.data import check_source_name
from posttrain_lib.config.evaluation import AnyTask, MetricGate
from posttrain_lib.config.load import build_config, expand_variables, load_yaml
from posttrain_lib.config.run import RunConfig
from posttrain_lib.config.train import MixedSource
from posttrain_lib.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


class GeneratedRows(Section):
    """Conversations made by the project's own generator, other ones in each file."""

    rows: int = Field(400, ge=10, description="conversations in a file")
    seed: int = 0


class Landing(Section):
    """Where new rows land: files that are written once. What is new is told by content, never by a date."""

    path: str | None = Field(None, description="folder or URL of a store's folder; JSON lines and Parquet")
    generate: GeneratedRows | None = Field(
        None, description="no folder of yours: each run that finds nothing new first lands a file of such rows"
    )
    name: str = Field("landed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the source's, in receipts")
    format: str = Field("messages", description="as data.sources.format")
    fields: dict[str, str] = Field(default_factory=dict, description="as data.sources.fields")
    mixture: MixedSource | None = Field(None, description="its part in train.mixture; default: its size")
    changed: Literal["stop", "take"] = Field(
        "stop",
        description="a file that was taken and has other content by now: the run stops and names it, or takes it "
        "again, whole. Of JSON lines that grew behind what was taken, the new lines are taken in either case",
    )
    rejected: Literal["leave_out", "offer_again"] = Field(
        "leave_out",
        description="rows of a rejected candidate, or of a version that was rolled back: they stay out, or the next "
        "run takes them again beside what is new",
    )

    @field_validator("name")
    @classmethod
    def _is_not_the_whole(cls, value: str) -> str:
        return check_source_name(value)

    @model_validator(mode="after")
    def _one_origin(self) -> Landing:
        if (self.path is None) == (self.generate is None):
            raise ValueError("rows land in one place: give exactly one of 'path' and 'generate'")
        if self.generate is not None and (self.format != "messages" or self.fields):
            raise ValueError(
                "generated rows are of format messages, with its own fields: leave 'format' and 'fields' out"
            )
        return self


class ScheduleConfig(Section):
    """When a deployed flow starts."""

    cron: str = Field(
        "0 3 * * ? *",
        description="minute, hour, day of month, month, day of week, year: as AWS EventBridge writes them, for Step "
        "Functions takes no other form; Argo gets the first five. Days of the week are named, as MON-FRI",
    )
    timezone: str | None = Field(
        None,
        description="of the schedule, as Europe/Berlin; Argo alone takes one. Default: the scheduler's, UTC unless "
        "someone set it otherwise",
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, text: str) -> str:
        return check_cron(text)

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        known = zoneinfo.available_timezones()  # none, where a system has no such files
        if name is not None and known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"no time zone is called {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return name


class Resources(Section):
    """What the training step asks of Kubernetes or Batch; other steps ask for the same without the GPUs."""

    cpu: int = Field(2, ge=1)
    memory_mb: int = Field(8192, ge=1024)
    gpu: int = Field(0, ge=0)


class Limits(Section):
    """How long a step may take, and how often it is tried again where its machine fails."""

    step_hours: int = Field(24, ge=1)
    retries: int = Field(2, ge=0, le=4)
    minutes_between_retries: int = Field(1, ge=0)


class RetrainConfig(Section):
    """Everything that a retrain depends on. The run file is read when the flow is started or deployed."""

    recipe: Literal["retrain"] = "retrain"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the model: models/<name>")
    run_file: str | None = Field(
        None, description="how it is trained: any recipe's run file; a relative path is below the project's folder"
    )
    run: RunConfig = Field(description="what is to be otherwise than in the run file; without one, all of it")
    landing: Landing
    keep_sources: bool = Field(
        True,
        description="train on the run file's own sources beside what landed, so that less is forgotten; false: they "
        "are for the first version alone",
    )
    suites: tuple[AnyTask, ...] = Field(
        (),
        description="tasks on fixed rows that every candidate and the current version answer, beside those of the run "
        "file; a relative 'file' is below the project's folder",
    )
    gates: dict[str, MetricGate] = Field(
        {"held_out.loss": MetricGate(max_change=0.0)},
        min_length=1,
        description="bounds of a candidate's metrics and of their difference to the current version's (candidate minus "
        "current), as 'suite.accuracy': {min_change: -0.01}. The first version is held to the run file's own",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    resources: Resources = Resources()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _fits_the_run_file(self) -> RetrainConfig:
        names = {source.name for source in self.run.data.sources}
        if self.landing.name in names:
            raise ValueError(f"landing.name {self.landing.name!r} is a source of the run file too: give it another")
        titles = [task.title for task in (*self.run.evaluation.tasks, *self.suites)]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(f"several tasks are called {twice[0]!r}: give each a name of its own")
        for gate in self.gates:
            if gate.partition(".")[0] not in {*titles, "held_out"}:
                known = ", ".join(f"{title}.<metric>" for title in [*titles, "held_out"])
                raise ValueError(f"gates names {gate!r}, expected one of {known}")
        return self


def parse_retrain_config(text: str, *, where: str = "config", overrides: Sequence[str] = ()) -> RetrainConfig:
    """From YAML text, the run file that it names read in: expand ``${VARIABLE}``, apply overrides, validate.

    Raises:
        ConfigError: no YAML mapping, an unknown key or impossible value, here or in the run file.
    """
    raw = load_yaml(text, where)
    changes = raw.get("run") or {}
    if isinstance(raw.get("run_file"), str) and isinstance(changes, dict):
        named = expand_variables(raw["run_file"], where, ("run_file",))
        raw = {**raw, "run_file": named, "run": _laid_over(_run_file(named, where), changes)}
    return build_config(RetrainConfig, raw, where=where, overrides=overrides)


def build_retrain_config(raw: dict[str, Any], *, where: str = "config", overrides: Sequence[str] = ()) -> RetrainConfig:
    """Of a plain mapping whose run file was read in before; raises as above."""
    config = build_config(RetrainConfig, raw, where=where, overrides=overrides)
    if config.run_file != raw.get("run_file"):
        raise ConfigError(
            "the run file is read when the flow's own config is",
            where=f"{where}: run_file",
            got=config.run_file,
            fix="write it into the file that --config names; single values of it are set as run.train.steps=50",
        )
    return config


def _run_file(named: str, where: str) -> dict[str, Any]:
    path = PROJECT_ROOT / Path(named).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the run file of a retrain cannot be read",
            where=f"{where}: run_file",
            got=error,
            fix="name an existing YAML file in UTF-8",
        ) from error
    return load_yaml(text, str(path))


def _laid_over(file: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The file's sections with what is to be otherwise; a list replaces a list."""
    merged = dict(file)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
