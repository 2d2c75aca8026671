"""Held-out loss per source, with the loss object that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.loader import held_out_batches
from posttrain_lib.parallel.context import own_part
from posttrain_lib.parallel.mesh import RankMesh
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch


def source_sums(batch: PackedBatch, nll_N: Tensor, sources: int) -> Tensor:
    """Weighted loss and weight per source: float64 [sources, 2] on the batch's device."""
    document_N = torch.searchsorted(batch.cu_seqlens, batch.supervised_index.to(torch.int32), right=True) - 1
    source_N = batch.document_sources[document_N].long()
    weight_N = batch.loss_weights[batch.supervised_index].double()
    sums = torch.zeros(sources, 2, dtype=torch.float64, device=nll_N.device)
    sums.index_add_(0, source_N, torch.stack([nll_N.double() * weight_N, weight_N], dim=1))
    return sums


def mean_losses(sums: Tensor, names: list[str]) -> dict[str, float]:
    """``{"all": mean, "<source>": mean}`` of global [sources, 2] sums, without sources of no weight."""
    total, weight = sums.sum(dim=0).tolist()
    means = {name: loss / count for name, (loss, count) in zip(names, sums.tolist(), strict=True) if count > 0}
    return {"all": total / weight if weight > 0 else 0.0, **means}


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
) -> dict[str, float]:
    """Mean loss per trained token over the whole store, overall and per source, the same on every rank.

    ``row_tokens`` is the length of a packed row and bounds memory with ``batch_rows``; neither changes the result
    beyond rounding. ``mesh``: of the ranks that share the work; default: this process alone, where the model is.
    """
    mesh = mesh or RankMesh(SINGLE, next(model.parameters()).device)
    device, rank, world = mesh.device, mesh.data_rank, mesh.spec.data_degree
    sums = torch.zeros(len(store.sources), 2, dtype=torch.float64, device=device)
    shared = not (model.config.is_recurrent or model.config.changes_rope(1, store.longest))
    for arrays in held_out_batches(
        store, row_tokens=row_tokens, rank=rank, world=world, batch_rows=batch_rows, share_prefixes=shared
    ):
        batch = to_torch(own_part(arrays, mesh), device)
        with autocast(device, precision):
            output = loss(model, batch)
        sums += source_sums(batch, output.nll, len(store.sources))
    total = torch.tensor(mesh.sum_over_tokens(sums.flatten().tolist()), dtype=torch.float64)
    return mean_losses(total.view(len(store.sources), 2), store.sources)
