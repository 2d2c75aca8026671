"""Saving and loading a training state beside torch.distributed.checkpoint, the same state in the same run:

    python -m tests.benchmarks.checkpointing --output tests/benchmarks/results/checkpointing.json

The state is float32 weights and both moments of AdamW, ``--gigabytes`` in all. Rounds are interleaved, figures are
medians; both sides flush to the disk, and round 0, in which both allocate what they use again, is left out.

Kept of saving: the stall, that is how long the training's thread was held up (here: with nothing to hide the copy
behind, and with products of matrices running until it is needed; for the peer: until ``async_save`` returns, with the
default stager and with the one that keeps its memory), and bytes per second until the checkpoint is there. Of loading,
into tensors that are there already: bytes per second with the files out of the page cache and in it, and by how much
resident memory rose.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from posttrain_lib.checkpoint.manager import CheckpointManager
from posttrain_lib.training.state import Progress, TrainState
from tests.benchmarks.machine import Resident, out_of_cache
from tests.benchmarks.recording import Recording, argument_parser

#: a block's matrices, the shapes of a decoder of hidden size 1024
_SHAPES = ((1024, 1024), (1024, 1024), (3072, 1024), (1024, 3072), (1024,))


class Position:
    """The loader's part: nothing."""

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        assert not state


def make_state(gigabytes: float) -> TrainState:
    """Weights and moments of so many bytes in all."""
    block = 12 * sum(torch.Size(shape).numel() for shape in _SHAPES)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(
        torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape)) for shape in _SHAPES)
        for _ in range(max(1, round(gigabytes * 1e9 / block)))
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(model, optimizer, Position(), {}, Progress(step=1), {"step": 1})  # type: ignore[arg-type]


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Ours:
    """The project's own engine."""

    def __init__(self, state: TrainState, folder: Path) -> None:
        self.state, self.folder = state, folder / "ours"
        self.manager = CheckpointManager(self.folder, 1, asynchronous=True)

    def save(self) -> dict[str, float]:
        shutil.rmtree(self.folder, ignore_errors=True)
        found = {"total": seconds(lambda: self.manager.save(self.state, wait=True))}
        shutil.rmtree(self.folder)
        begun = time.perf_counter()
        self.manager.take_stall_seconds()
        self.manager.save(self.state)
        self.manager.before_update()
        found["stall"] = self.manager.take_stall_seconds()
        self.manager.wait()
        found["asynchronous_total"] = time.perf_counter() - begun
        shutil.rmtree(self.folder)
        self.manager.take_stall_seconds()
        self.manager.save(self.state)
        left = torch.randn(512, 512)
        until = time.perf_counter() + 3 * found["stall"]
        while time.perf_counter() < until:
            left = torch.tanh(left @ left)
        self.manager.before_update()
        found["stall_behind_compute"] = self.manager.take_stall_seconds()
        self.manager.wait()
        return found

    def load(self) -> None:
        self.manager.load(self.manager.path(1), self.state)

    @property
    def saved(self) -> Path:
        return Path(self.manager.path(1))


class Peer:
    """torch.distributed.checkpoint in one process."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self.tensors, self.saved = tensors, folder / "dcp"
        self.stager = DefaultStager(StagingOptions(False, False, False, False))  # plain memory, used again

    def save(self) -> dict[str, float]:
        shutil.rmtree(self.saved, ignore_errors=True)
        found = {"total": seconds(self._save)}
        for name, stager in (("stall", None), ("stall_kept_memory", self.stager)):
            shutil.rmtree(self.saved)
            begun = time.perf_counter()
            done = dcp.async_save(self.tensors, checkpoint_id=self.saved, async_stager=stager)
            found[name] = time.perf_counter() - begun
            done.result()
            found["asynchronous_total" if stager is None else "asynchronous_total_kept_memory"] = (
                time.perf_counter() - begun
            )
        return found

    def _save(self) -> None:
        dcp.save(self.tensors, checkpoint_id=self.saved, no_dist=True)

    def load(self) -> None:
        dcp.load(self.tensors, checkpoint_id=self.saved, no_dist=True)


def loading(side: Ours | Peer) -> dict[str, float]:
    out_of_cache(side.saved)
    found = {"load_cold": seconds(side.load)}
    side.load()  # whatever the first did not leave in the cache
    with Resident() as resident:
        found["load_warm"] = seconds(side.load)
    return {**found, "load_rise_bytes": float(max(0, resident.rise))}


def main() -> None:
    """See the module's text."""
    parser = argument_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; default: a temporary one")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    recording = Recording("torch", hidden={options.folder: "FOLDER"})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    state = make_state(options.gigabytes)
    size = sum(tensor.nbytes for tensor in state.tensors().values())
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "torch.distributed.checkpoint": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sides = {"ours": Ours(state, Path(folder)), "torch.distributed.checkpoint": Peer(state.tensors(), Path(folder))}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                found = {**side.save(), **loading(side)}
                if number:
                    rounds[name].append(found)
                print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    torch.distributed.destroy_process_group()
    medians = {
        name: {key: statistics.median(found[key] for found in all_found) for key in all_found[0]}
        for name, all_found in rounds.items()
    }
    ours, peer = medians["ours"], medians["torch.distributed.checkpoint"]
    figures = {
        "state_bytes": size,
        "rounds": options.rounds,
        "seconds": medians,
        "bytes_per_second": {
            name: {key: size / found[key] for key in ("total", "asynchronous_total", "load_cold", "load_warm")}
            for name, found in medians.items()
        },
        "ratios": {
            "stall": ours["stall"] / peer["stall"],
            "stall_to_kept_memory": ours["stall"] / peer["stall_kept_memory"],
            "stall_behind_compute": ours["stall_behind_compute"] / min(peer["stall"], peer["stall_kept_memory"]),
            "write_rate": peer["total"] / ours["total"],
            "load_cold_rate": peer["load_cold"] / ours["load_cold"],
            "load_warm_rate": peer["load_warm"] / ours["load_warm"],
        },
        "load_rise_of_state": {name: found["load_rise_bytes"] / size for name, found in medians.items()},
        "all_rounds": rounds,
    }
    print(figures["ratios"], figures["bytes_per_second"])
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
