"""Held-out loss per source and a loss's own figures, with the loss object that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.loader import held_out_batches
from posttrain_lib.losses.base import run_loss
from posttrain_lib.models.spec import can_share_prefixes
from posttrain_lib.parallel.context import own_part
from posttrain_lib.parallel.mesh import RankMesh
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.losses.base import Loss, LossOutput
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch

#: what the mean over all sources is called; no source has this name
ALL = "all"


@dataclass(frozen=True)
class Means:
    """``losses``: ``{"all": mean, "<source>": mean}``; ``figures``: the loss's own, by name."""

    losses: dict[str, float]
    figures: dict[str, float]


def output_sums(loss: Loss, batch: PackedBatch, output: LossOutput, sources: int) -> Tensor:
    """Weighted loss and weight per source, then sum and weight of each figure: float64 [sources + figures, 2]."""
    device = output.values.device
    sums = torch.zeros(sources + len(loss.figures), 2, dtype=torch.float64, device=device)
    weights = output.weights.double()
    source_M = batch.document_sources[output.segments].long()
    sums.index_add_(0, source_M, torch.stack([output.values.double() * weights, weights], dim=1))
    for number, name in enumerate(loss.figures, start=sources):
        sums[number] = output.figures[name]
    return sums


def means_of(sums: Tensor, loss: Loss, sources: list[str]) -> Means:
    """The means of global sums [sources + figures, 2]; a figure of no weight is left out."""
    of_figures = zip(loss.figures, sums[len(sources) :].tolist(), strict=True)
    figures = {name: total / weight for name, (total, weight) in of_figures if weight > 0}
    return Means(mean_losses(sums[: len(sources)], sources), figures)


def mean_losses(sums: Tensor, names: list[str]) -> dict[str, float]:
    """``{"all": mean, "<source>": mean}`` of global [sources, 2] sums, without sources of no weight."""
    total, weight = sums.sum(dim=0).tolist()
    means = {name: loss / count for name, (loss, count) in zip(names, sums.tolist(), strict=True) if count > 0}
    return {ALL: total / weight if weight > 0 else 0.0, **means}


@torch.no_grad()
def held_out_loss(
    model: Decoder,
    loss: Loss,
    store: TokenStore,
    *,
    row_tokens: int,
    batch_rows: int = 1,
    mesh: RankMesh | None = None,
    precision: str = "fp32",
    observe: Callable[[PackedBatch, LossOutput], None] | None = None,
) -> Means:
    """Mean loss per item (trained token, or pair) over the whole store, overall and per source, and the loss's
    figures, the same on every rank.

    ``row_tokens`` is the length of a packed row and bounds memory with ``batch_rows``; neither changes the result
    beyond rounding. ``mesh``: of the ranks that share the work; default: this process alone, where the model is.
    ``observe`` is called with each of this rank's batches and what the loss gave for it.
    """
    mesh = mesh or RankMesh(SINGLE, next(model.parameters()).device)
    device, rank, world = mesh.device, mesh.data_rank, mesh.spec.data_degree
    rows = len(store.sources) + len(loss.figures)
    sums = torch.zeros(rows, 2, dtype=torch.float64, device=device)
    frozen = None if loss.beside is None else loss.beside.model
    models = [model] if frozen is None else [model, frozen]
    shared = all(can_share_prefixes(each.config, store.longest) for each in models)
    for arrays in held_out_batches(
        store, row_tokens=row_tokens, rank=rank, world=world, batch_rows=batch_rows, share_prefixes=shared
    ):
        batch = to_torch(with_signals(own_part(arrays, mesh), loss, "held_out"), device)
        with autocast(device, precision):
            output = run_loss(loss, model, batch)
        if observe is not None:
            observe(batch, output)
        sums += output_sums(loss, batch, output, len(store.sources))
    total = torch.tensor(mesh.sum_over_tokens(sums.flatten().tolist()), dtype=torch.float64)
    return means_of(total.view(rows, 2), loss, store.sources)


def with_signals(batch: PackedBatch, loss: Loss, split: str) -> PackedBatch:
    """The batch (numpy) with what the loss adds to it."""
    signals = loss.signals(batch, split)
    return dataclasses.replace(batch, signals=signals) if signals else batch
