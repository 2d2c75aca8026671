"""A loss and its gradients over any mesh, the frozen model that it compares with laid over the same ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import pack
from posttrain_lib.optim.clipping import gradient_norm
from posttrain_lib.training.train_step import StepSettings, accumulate_gradients
from tests.support.sharded_gradients import Outcome, Work, build, gradients

#: units of each row; a rank of two has two rows, of which the last has a single unit or none
ROWS = [(0, 1), (2, 3, 4), (5,), ()]


def compute(_rank: int, work: Work, reference: str, name: str, options: dict[str, Any]) -> Outcome:
    """As ``sharded_gradients.compute``, of any loss. With adapters the reference is the model without them, else that
    of the folder ``reference``."""
    model, mesh = build(work)
    store, loss = TokenStore(Path(work.store)), build_loss(name, options)
    if loss.needs:
        frozen = None if work.lora else build(dataclasses.replace(work, model=reference))[0].requires_grad_(False)
        loss.attach(Beside(frozen))
    batches = pack(store, ROWS[mesh.data_rank :: work.mesh.data_degree], 1, share=True)
    (divisor,) = mesh.sum_over_rows([sum(loss.divisor(batch) for batch in batches)])
    settings = StepSettings(mesh, "fp32", None, sources=len(store.sources), name_example=str)
    mean, sums = accumulate_gradients(model, loss, batches, settings, global_divisor=divisor)
    return Outcome(mean, sums, float(gradient_norm(model.parameters())), gradients(model))
