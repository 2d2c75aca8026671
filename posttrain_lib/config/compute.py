"""The ``compute`` section: how many workers, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain_lib.config.base import Section


class ComputeConfig(Section):
    """The same job on one worker or many; nothing else in the run file changes."""

    workers: int = Field(1, ge=1, description="identical training actors")
    launcher: Literal["ray", "in_process"] = "ray"
    address: str | None = Field(None, description="host:port of a running Ray cluster; default: a local one")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_worker: int | None = Field(None, ge=1, description="CPU threads of a worker; default: cores / workers")
    loader_workers: int = Field(
        1,
        ge=0,
        description="of each training actor; 0: data is made in the training loop, else beside it; "
        "with data.on_the_fly this many tokenising processes",
    )
    retries: int = Field(2, ge=0, le=4, description="restarts from the last checkpoint after a lost worker or process")
