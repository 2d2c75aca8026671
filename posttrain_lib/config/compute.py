"""The ``compute`` section: how many devices, where, and what they share."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Disagreement, Problem, Section
from posttrain_lib.schema.mesh import MeshSpec


class Mesh(Section):
    """Degrees of the mesh's axes; their product is the number of devices. See ``schema.mesh.MeshSpec``."""

    replicate: int = Field(1, ge=1, description="copies of the model that see different rows (hybrid sharding)")
    shard: int | None = Field(
        None, ge=1, description="devices that share one copy's weights (FSDP2); default: all that the others leave"
    )
    context: int = Field(1, ge=1, description="devices that share one long row's tokens")
    tensor: int = Field(1, ge=1, description="devices that share one token's heads, features and vocabulary")
    expert: int = Field(
        1, ge=1, description="devices that experts are dealt out over; taken from those of shard and context"
    )


#: names that the plan knows; ``compute.plan`` has their memory, ``training.peaks`` what they compute
Gpu = Literal["GB200", "B200", "H200", "H100", "A100", "A100-40", "L40S", "A10", "RTX 4090", "MI300X"]


class ComputeConfig(Section):
    """The same job on one device or hundreds; nothing else in the run file changes."""

    nodes: int = Field(1, ge=1, description="machines")
    devices_per_node: int = Field(1, ge=1, description="GPUs of each; on a CPU, processes")
    mesh: Mesh = Mesh()
    launcher: Literal["auto", "in_process", "ray", "torchrun"] = Field(
        "auto",
        description="auto: torchrun under torchrun, in_process for one device without an address, else ray",
    )
    address: str | None = Field(
        None,
        description="a running Ray cluster: host:port, ray://host:port, or auto = $RAY_ADDRESS; default: a local one",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu: Gpu | None = Field(None, description="what the devices are, for the plan's memory and time")
    device_memory_gib: float | None = Field(
        None, gt=0, description="of a device, for the plan; default: by compute.gpu, or this machine's own"
    )
    host_memory_gib: float | None = Field(
        None,
        gt=0,
        description="of a node, for the plan of offloaded shares; default: this machine's free memory, where it trains",
    )
    offload: Literal["none", "parameters"] = Field(
        "none",
        description="parameters: each device's share of weights, gradients and optimiser state lies in host memory",
    )
    threads_per_worker: int | None = Field(None, ge=1, description="CPU threads of a worker; default: cores / workers")
    loader_workers: int = Field(
        1,
        ge=0,
        description="of each training actor; 0: data is made in the training loop, else beside it; "
        "with data.on_the_fly this many tokenising processes",
    )
    retries: int = Field(2, ge=0, le=4, description="restarts from the last checkpoint after a lost worker or process")
    min_devices: int | None = Field(
        None, ge=1, description="after a loss, go on with as few as this many devices; default: wait for all of them"
    )
    hang_seconds: float = Field(
        1800.0, gt=0, description="without any rank moving for this long, the job counts as hung: lost and restarted"
    )
    stop_signals: list[Literal["SIGTERM", "SIGUSR1", "SIGXCPU", "SIGHUP"]] = Field(
        ["SIGTERM", "SIGUSR1"], description="announce that the machine is taken back: step, checkpoint, retryable exit"
    )

    @property
    def workers(self) -> int:
        """Ranks: one for each device."""
        return self.nodes * self.devices_per_node

    def mesh_spec(self) -> MeshSpec:
        """The mesh with every degree known."""
        return MeshSpec(**self._degrees())

    def _degrees(self) -> dict[str, int]:
        degrees: dict[str, int] = self.mesh.model_dump()
        if self.mesh.shard is None:
            others = self.mesh.replicate * self.mesh.context * self.mesh.tensor
            degrees["shard"] = max(1, self.workers // others)
        return degrees

    @model_validator(mode="after")
    def _is_possible(self) -> ComputeConfig:
        if problems := [*self._launch_problems(), *self._mesh_problems()]:
            raise Disagreement(problems)
        return self

    def _launch_problems(self) -> list[Problem]:
        problems, devices = [], self.workers
        if self.launcher == "in_process" and devices > 1:
            what = f"compute.launcher 'in_process' runs one worker, and {devices} devices are asked for"
            problems.append(Problem(what, "set compute.launcher: ray, or leave it out"))
        if self.offload == "parameters" and devices == 1:
            what = "compute.offload: parameters is of sharded models: it needs two devices at least"
            problems.append(Problem(what, "set compute.offload: none, or compute.devices_per_node: 2"))
        if self.min_devices is not None and self.min_devices > devices:
            what = f"compute.min_devices ({self.min_devices}) is above the {devices} devices asked for"
            problems.append(Problem(what, f"set compute.min_devices: {devices} or lower"))
        return problems

    def _mesh_problems(self) -> list[Problem]:
        mesh, degrees, problems = self.mesh, self._degrees(), []
        world = degrees["replicate"] * degrees["shard"] * degrees["context"] * degrees["tensor"]
        if world != self.workers:
            shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if name != "expert")
            what = (
                f"compute.mesh has {world} devices ({shown}) and nodes x devices_per_node "
                f"({self.nodes} x {self.devices_per_node}) gives {self.workers}"
            )
            problems.append(Problem(what, self._mesh_fix(world // degrees["shard"], world)))
        ranks = degrees["shard"] * degrees["context"]
        if ranks % mesh.expert:
            what = (
                f"compute.mesh.expert ({mesh.expert}) has to divide shard x context ({degrees['shard']} x "
                f"{degrees['context']}): experts are dealt out over those ranks"
            )
            problems.append(Problem(what, f"set compute.mesh.expert: {math.gcd(ranks, mesh.expert)}"))
        return problems

    def _mesh_fix(self, others: int, world: int) -> str:
        """Values with which the degrees' product is the number of devices; ``others``: product of all but shard."""
        fixes = []
        if self.workers % others == 0:
            fixes.append(f"set compute.mesh.shard: {self.workers // others}")
        else:
            left, parts = self.workers, []
            for name in ("tensor", "context", "replicate"):  # in the order in which ranks stand together
                degree = math.gcd(left, getattr(self.mesh, name))
                left //= degree
                parts.append(f"{name}: {degree}")
            fixes.append(f"set compute.mesh: {{{', '.join([*parts, f'shard: {left}'])}}}")
        if world % self.devices_per_node == 0:
            fixes.append(f"compute.nodes: {world // self.devices_per_node}")
        elif self.nodes == 1:
            fixes.append(f"compute.devices_per_node: {world}")
        return ", or ".join(fixes)
