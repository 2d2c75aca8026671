"""The one training step: accumulate, stop on the non-finite, clip, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import TrainingError
from posttrain_lib.evaluation.perplexity import source_sums
from posttrain_lib.optim.clipping import clip_gradients, gradient_norm
from posttrain_lib.parallel.apply import synchronise_gradients
from posttrain_lib.parallel.process_group import gather_objects, global_sum
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class StepOutcome:
    """``loss`` and ``grad_norm`` of the step (before clipping); ``source_sums`` float64 [sources, 2], all global."""

    loss: float
    grad_norm: float
    source_sums: Tensor


def accumulate_gradients(
    model: Decoder,
    loss: Loss,
    micro_batches: Sequence[PackedBatch],
    *,
    global_divisor: float,
    world: int,
    sources: int,
    precision: str,
    device: torch.device,
) -> tuple[float, Tensor]:
    """Leave in ``.grad`` the gradient of ``global loss sum / global_divisor``; return the loss and per-source sums.

    The divisor is the same on every rank and known before the first backward, so nothing depends on how rows were
    split. FSDP2 averages gradients over ranks; the factor ``world`` makes that average the sum that is meant.

    Raises:
        TrainingError: the loss of some micro-batch on some rank is not finite; on every rank, naming the examples.
    """
    totals = torch.zeros(sources + 1, 2, dtype=torch.float64, device=device)
    suspects: list[int] = []
    for number, arrays in enumerate(micro_batches):
        batch = to_torch(arrays, device)
        synchronise_gradients(model, number == len(micro_batches) - 1)
        with autocast(device, precision):
            output = loss(model, batch)
        if not torch.isfinite(output.local_sum):
            suspects += non_finite_examples(batch, output.nll)
        (output.local_sum * (world / global_divisor)).backward()
        totals[0, 0] += output.local_sum.detach().double()
        totals[1:] += source_sums(batch, output.nll, sources)
    total = float(global_sum(totals)[0, 0])
    if not torch.isfinite(torch.tensor(total)):
        _stop_on_non_finite("loss", total, gather_objects(suspects))
    return total / global_divisor, totals[1:]


def train_step(
    model: Decoder,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    *,
    global_divisor: float,
    world: int,
    sources: int,
    precision: str,
    clip_norm: float | None,
    device: torch.device,
) -> StepOutcome:
    """One optimiser step over this rank's micro-batches.

    Raises:
        TrainingError: loss or gradient norm is not finite; the weights are then those of before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    mean, sums = accumulate_gradients(
        model,
        loss,
        micro_batches,
        global_divisor=global_divisor,
        world=world,
        sources=sources,
        precision=precision,
        device=device,
    )
    norm = gradient_norm(model.parameters())
    if not torch.isfinite(norm):
        _stop_on_non_finite("gradient norm", float(norm), gather_objects([]))
    if clip_norm is not None:
        clip_gradients(model.parameters(), clip_norm, norm)
    optimizer.step()
    return StepOutcome(mean, float(norm), sums)


def non_finite_examples(batch: PackedBatch, nll_N: Tensor) -> list[int]:
    """Store indices of the documents whose loss is not finite, in order."""
    bad_N = batch.supervised_index[~torch.isfinite(nll_N)].to(torch.int32)
    documents = torch.searchsorted(batch.cu_seqlens, bad_N, right=True) - 1
    return sorted({int(example) for example in batch.document_ids[documents]})


def _stop_on_non_finite(what: str, value: float, suspects_by_rank: list[list[int]]) -> None:
    examples = sorted({example for suspects in suspects_by_rank for example in suspects})
    where = f"examples {examples[:8]} of the training store" if examples else "no single example stands out"
    raise TrainingError(
        f"the {what} is not finite; the optimiser step was not taken",
        where=where,
        got=value,
        expected="a finite number",
        fix="lower the learning rate, lengthen the warm-up, clip harder, or look at those examples; "
        "the last checkpoint is good",
    )
