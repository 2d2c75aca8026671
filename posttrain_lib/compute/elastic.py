"""A smaller mesh for a job that has lost devices for good."""

from __future__ import annotations

import dataclasses
from itertools import product

from posttrain_lib.schema.mesh import MeshSpec


def smaller_mesh(
    mesh: MeshSpec, devices: int, *, least: int, rows_per_step: int, micro_batch_rows: int
) -> MeshSpec | None:
    """The largest mesh of at most ``devices`` that computes the same steps; None where none has ``least``.

    Only the axes that see different rows shrink, ``replicate`` and ``shard``: their product times ``micro_batch_rows``
    has to divide ``rows_per_step``, so that every rank has equally many rows. How a row or a weight is split over
    ``context`` and ``tensor`` stays. Of equally large ones the one that shares weights over more devices, for memory.
    """
    fitting = []
    for replicate, shard in product(range(1, mesh.replicate + 1), range(1, mesh.shard + 1)):
        if rows_per_step % (replicate * shard * micro_batch_rows) or (shard * mesh.context) % mesh.expert:
            continue
        smaller = dataclasses.replace(mesh, replicate=replicate, shard=shard)
        if least <= smaller.world <= devices:
            fitting.append(smaller)
    return max(fitting, key=lambda each: (each.world, each.shard), default=None)
