"""The ``compute`` section: how many devices, where, and what they share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section
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


class ComputeConfig(Section):
    """The same job on one device or hundreds; nothing else in the run file changes."""

    nodes: int = Field(1, ge=1, description="machines")
    devices_per_node: int = Field(1, ge=1, description="GPUs of each; on a CPU, processes")
    mesh: Mesh = Mesh()
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

    @property
    def workers(self) -> int:
        """Ranks: one for each device."""
        return self.nodes * self.devices_per_node

    def mesh_spec(self) -> MeshSpec:
        """The mesh with every degree known."""
        degrees = self.mesh.model_dump()
        if self.mesh.shard is None:
            others = self.mesh.replicate * self.mesh.context * self.mesh.tensor
            degrees["shard"] = max(1, self.workers // others)
        return MeshSpec(**degrees)

    @model_validator(mode="after")
    def _mesh_fits(self) -> ComputeConfig:
        mesh = self.mesh_spec()
        if mesh.world != self.workers:
            degrees = " x ".join(f"{name} {degree}" for name, degree in vars(mesh).items() if name != "expert")
            raise ValueError(
                f"compute.mesh has {mesh.world} devices ({degrees}) and nodes x devices_per_node "
                f"({self.nodes} x {self.devices_per_node}) gives {self.workers}"
            )
        return self
