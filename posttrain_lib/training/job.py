"""What a training worker is told: plain values, picklable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain_lib.schema.mesh import SINGLE, MeshSpec

if TYPE_CHECKING:
    from posttrain_lib.config.model import Lora
    from posttrain_lib.config.train import TrainConfig
    from posttrain_lib.data.live_feed import LiveSpec
    from posttrain_lib.rl.job import RolloutJob
    from posttrain_lib.schema.companion import Companion


@dataclass(frozen=True)
class TrainJob:
    """One rank's orders; ranks of one job differ in ``rank`` alone. ``mesh`` says how many there are, and what they
    share.

    ``train`` is a TrainConfig, or anything with its attributes (a bare machine needs no pydantic).
    ``work_dir`` is seen by all ranks and holds ``checkpoints/``; a job whose checkpoints are there goes on from the
    newest good one. ``threads`` are CPU threads of this rank, None = leave as is.
    ``loader_workers``: 0 makes the data in the loop, otherwise beside it; with ``live``, above 1 that many processes.
    ``offload``: "parameters" keeps each rank's share of weights and optimiser state in the host's memory.
    ``live``: rows to tokenise while training; ``train_store`` is then a sample of them.
    ``pad_vocabulary_to``: embedding and head have rows in multiples of it, 1 = as many as the vocabulary; on resume it
    must be what it was. ``lora``: adapters to train on the frozen model (a config section, or anything with its
    attributes); None: all weights are trained. ``companion``: the frozen model that the loss compares with.
    ``score_padding``: a reward model is trained, and this is the padding token of its config.json; None: no such model.
    ``backend`` "hf": the model runs as transformers' own class. ``rollouts``: what is learned is sampled by the model
    itself and graded (``rl.run``); the stores are then not looked at.
    """

    model_folder: str
    train_store: str
    held_out_store: str
    work_dir: str
    train: TrainConfig
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    loader_workers: int = 1
    live: LiveSpec | None = None
    pad_vocabulary_to: int = 1
    lora: Lora | None = None
    backend: Literal["native", "hf"] = "native"
    rank: int = 0
    mesh: MeshSpec = SINGLE
    offload: Literal["none", "parameters"] = "none"
    companion: Companion | None = None
    score_padding: int | None = None
    rendezvous: str | None = None
    rollouts: RolloutJob | None = None

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.mesh.world

    @property
    def checkpoint_folder(self) -> str | Path:
        """Where the job's checkpoints stand: in the work folder, or by its name in the store that the job names."""
        store = self.train.checkpoint.folder
        if store is None:
            return Path(self.work_dir) / "checkpoints"
        return f"{store.rstrip('/')}/{Path(self.work_dir).name}"
