"""The one training step: accumulate, stop on the non-finite, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import TrainingError
from posttrain_lib.evaluation.perplexity import source_sums
from posttrain_lib.optim.clipping import clip_gradients, gradient_norm
from posttrain_lib.parallel.apply import gradient_scale, synchronise_gradients
from posttrain_lib.parallel.process_group import gather_objects, global_sum, world_size
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch

#: examples named when a step goes wrong
_NAMED = 8


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know besides its data. ``name_example`` turns a store index into "source: row id"."""

    device: torch.device
    precision: str
    clip_norm: float | None
    sources: int
    name_example: Callable[[int], str]


@dataclass(frozen=True)
class StepOutcome:
    """``loss`` and ``grad_norm`` of the step (before clipping); ``source_sums`` float64 [sources, 2], all global."""

    loss: float
    grad_norm: float
    source_sums: Tensor


def train_step(
    model: Decoder,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int,
) -> StepOutcome:
    """One optimiser step over this rank's micro-batches (numpy).

    Args:
        global_divisor: sum of ``loss.divisor`` over every micro-batch of every rank.
        step: its number, for messages.

    Raises:
        TrainingError: loss or gradient norm is not finite; the weights are then those of before the step.
    """
    mean, sums = accumulate_gradients(model, loss, micro_batches, settings, global_divisor=global_divisor, step=step)
    norm = gradient_norm(model.parameters())
    grad_norm = float(norm)
    if not math.isfinite(grad_norm):
        _stop("gradient norm", grad_norm, step, _names(_all_examples(micro_batches), settings))
    if settings.clip_norm is not None:
        clip_gradients(model.parameters(), settings.clip_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(mean, grad_norm, sums)


def accumulate_gradients(
    model: Decoder,
    loss: Loss,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int = 0,
) -> tuple[float, Tensor]:
    """Leave in ``.grad`` the gradient of ``global loss sum / global_divisor``; return the loss and per-source sums.

    The divisor is the same on every rank and known before the first backward, so nothing depends on how rows were
    split over micro-batches and ranks.

    Raises:
        TrainingError: the global loss is not finite; on every rank, naming the examples.
    """
    scale = gradient_scale(model, global_divisor, world_size())
    device, sources = settings.device, settings.sources
    totals = torch.zeros(1 + 2 * sources, dtype=torch.float64, device=device)
    nlls: list[Tensor] = []
    for number, arrays in enumerate(micro_batches):
        batch = to_torch(arrays, device)
        synchronise_gradients(model, number == len(micro_batches) - 1)
        with autocast(device, settings.precision):
            output = loss(model, batch)
        (output.local_sum * scale).backward()
        nlls.append(output.nll)
        totals[0] += output.local_sum.detach()
        totals[1:] += source_sums(batch, output.nll, sources).flatten()
    total, *by_source = global_sum(totals.tolist())  # the only wait for the device before the gradient norm
    if not math.isfinite(total):
        suspects = [example for pair in zip(micro_batches, nlls, strict=True) for example in _non_finite(*pair)]
        _stop("loss", total, step, _names(suspects or _all_examples(micro_batches), settings))
    mean = total / global_divisor if global_divisor else 0.0
    return mean, torch.tensor(by_source, dtype=torch.float64).view(sources, 2)


def _non_finite(batch: PackedBatch, nll_N: Tensor) -> list[int]:
    """Store indices of the documents whose loss is not finite, in order; ``batch`` is of numpy arrays."""
    bad_N = torch.from_numpy(batch.supervised_index)[~torch.isfinite(nll_N.cpu())].to(torch.int32)
    documents = torch.searchsorted(torch.from_numpy(batch.cu_seqlens), bad_N, right=True) - 1
    return sorted({int(example) for example in batch.document_ids[documents.numpy()]})


def _all_examples(micro_batches: Sequence[PackedBatch]) -> list[int]:
    return [int(example) for batch in micro_batches for example in batch.document_ids if example >= 0]


def _names(examples: Sequence[int], settings: StepSettings) -> list[str]:
    return [settings.name_example(example) for example in examples]


def _stop(what: str, value: float, step: int, names: list[str]) -> None:
    """Raise on every rank alike, with the examples of all ranks."""
    found = [name for part in gather_objects(names) for name in part]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise TrainingError(
        f"the {what} of step {step} is not finite; the optimiser step was not taken",
        where=f"step {step}, rows {', '.join(found[:_NAMED])}{more}",
        got=value,
        expected="a finite number",
        fix="lower train.optimizer.lr, lengthen the warm-up, clip harder, or look at those rows; "
        "the last checkpoint is good",
    )
