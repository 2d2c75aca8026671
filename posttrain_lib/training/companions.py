"""Give a loss the frozen model that it compares with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule

from posttrain_lib.data.signal_table import SignalTable
from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.beside import Beside
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.training.build import load_sharded_model

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.hf_spec import HFSpec
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.parallel.mesh import RankMesh
    from posttrain_lib.schema.companion import Companion
    from posttrain_lib.training.job import TrainJob


def attach_companion(
    loss: Loss,
    companion: Companion | None,
    stores: Mapping[str, TokenStore],
    load: Callable[[str], Decoder],
) -> None:
    """Hand the loss what it needs; nothing where it needs nothing.

    Args:
        stores: by split, the examples that stored signals must be about.
        load: makes a frozen model of a folder, on the ranks of the trained one.

    Raises:
        ConfigError: the loss needs a frozen model and the job names none.
        DataError: the stored signals are of other data or another model.
    """
    if loss.needs is None:
        return
    if companion is None:
        raise ConfigError(
            f"the loss needs a {loss.needs}, and the run names none",
            where="train.loss",
            got=type(loss).__name__,
            fix="choose the recipe that has one (dpo for a reference, distill for a teacher)",
        )
    if companion.kept == "stored":
        tables = {
            split: SignalTable(companion.tables[split], store, companion.made_of) for split, store in stores.items()
        }
        loss.attach(Beside(tables=tables))
    elif companion.kept == "base":
        loss.attach(Beside())
    else:
        assert companion.folder is not None, "a live companion has a folder"
        loss.attach(Beside(model=load(companion.folder)))


def load_frozen(job: TrainJob, mesh: RankMesh, folder: str) -> Decoder:
    """The model of a folder, laid over the job's ranks as the trained one is, without gradients or adapters."""
    spec = with_padded_vocabulary(spec_from_folder(folder), job.pad_vocabulary_to)
    alone = dataclasses.replace(job, model_folder=folder, lora=None, backend="native")
    model: Decoder = load_sharded_model(spec, alone, mesh).requires_grad_(False)
    if isinstance(model, FSDPModule):
        # The root keeps its weights whole for a backward, and this one has none: embedding and head on every rank.
        model.set_reshard_after_forward(True, recurse=False)
    return model.eval()


def frozen_spec(loss: Loss, job: TrainJob, trained: ModelSpec | HFSpec) -> ModelSpec | HFSpec | None:
    """What the model is that the loss runs beside the trained one in every step; None where it runs none.

    Args:
        trained: the trained model's, without adapters.
    """
    companion = job.companion
    if loss.needs is None or companion is None or companion.kept == "stored":
        return None
    if companion.kept == "base":
        return trained
    assert companion.folder is not None, "a live companion has a folder"
    return with_padded_vocabulary(spec_from_folder(companion.folder), job.pad_vocabulary_to)
