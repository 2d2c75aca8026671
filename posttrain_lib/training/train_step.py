"""The one training step: accumulate, stop on the non-finite, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import PosttrainError
from posttrain_lib.evaluation.perplexity import output_sums, with_signals
from posttrain_lib.losses.base import run_loss
from posttrain_lib.optim.clipping import clip_gradients, gradient_norm
from posttrain_lib.parallel.apply import gradient_scale, settle_gradients, synchronise_gradients
from posttrain_lib.parallel.context import own_part
from posttrain_lib.parallel.process_group import gather_objects, global_max
from posttrain_lib.training import pulse
from posttrain_lib.training.device import autocast
from posttrain_lib.training.incidents import incident
from posttrain_lib.training.timing import NO_CLOCK, StepClock

if TYPE_CHECKING:
    from posttrain_lib.losses.base import Loss
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.parallel.mesh import RankMesh
    from posttrain_lib.schema.batches import PackedBatch

#: loss of each item of a micro-batch, and the segment it belongs to
Items = tuple[Tensor, Tensor]

#: documents of the highest loss that are named when a step is a spike
_NAMED = 8


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know besides its data. ``name_example`` turns a store index into "source: row id"."""

    mesh: RankMesh
    precision: str
    clip_norm: float | None
    sources: int
    name_example: Callable[[int], str]
    clock: StepClock = NO_CLOCK


@dataclass(frozen=True)
class StepOutcome:
    """``loss`` and ``grad_norm`` of the step (before clipping); ``sums`` float64 [sources + figures, 2], see
    ``evaluation.perplexity``; ``extremes`` of the loss by name; all global. A step that was not taken has no loss, and
    says why in ``skipped``."""

    loss: float | None
    grad_norm: float
    sums: Tensor
    skipped: str = ""
    extremes: dict[str, float] = field(default_factory=dict)


@dataclass
class Accumulated:
    """What the micro-batches of a step come to. ``mean`` loss, ``sums`` and ``extremes`` as of :class:`StepOutcome`;
    ``items`` of each micro-batch."""

    mean: float
    sums: Tensor
    items: list[Items]
    extremes: dict[str, float]


def train_step(
    model: Decoder,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int,
    spike: Callable[[float, float], tuple[str, float, str] | None] = lambda loss, norm: None,
    judge: Callable[[StepOutcome], None] = lambda outcome: None,
    before_update: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """One optimiser step over this rank's micro-batches (numpy).

    Args:
        global_divisor: sum of ``loss.divisor`` over every micro-batch of every rank.
        step: its number, for messages.
        spike: called with loss and gradient norm; (quantity, value, bound) where the step must not be taken.
        judge: called with the outcome before anything changes; what it raises ends the step.
        before_update: called right before weights and optimiser change; what still reads them is waited for there.

    Raises:
        StepIncident: loss or gradient norm is not finite, or a spike; weights and optimiser are then those of before
            the step, and there are no gradients.
    """
    micro_batches = [own_part(batch, settings.mesh) for batch in micro_batches]
    try:
        outcome, norm = _gradients(
            model, loss, micro_batches, settings, global_divisor=global_divisor, step=step, spike=spike
        )
        judge(outcome)
    except PosttrainError:
        optimizer.zero_grad(set_to_none=True)
        raise
    with settings.clock.part("optimizer"):
        if settings.clip_norm is not None:
            clip_gradients(model.parameters(), settings.clip_norm, norm)
    with settings.clock.part("checkpoint"):
        before_update()
    with settings.clock.part("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return outcome


def _gradients(
    model: Decoder,
    loss: Loss,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int,
    spike: Callable[[float, float], tuple[str, float, str] | None],
) -> tuple[StepOutcome, Tensor]:
    """(outcome, the gradient norm as a tensor) of a step that may be taken."""
    found_here = _accumulate(model, loss, micro_batches, settings, global_divisor=global_divisor, step=step)
    mean, items = found_here.mean, found_here.items
    with settings.clock.part("optimizer"):
        norm = gradient_norm(model.parameters())
        grad_norm = float(norm)
    finite = math.isfinite(grad_norm)
    found = spike(mean, grad_norm) if finite and global_divisor else None
    if finite and found is None:
        return StepOutcome(mean, grad_norm, found_here.sums, extremes=found_here.extremes), norm
    rows = _everywhere(_names(_all_examples(micro_batches), settings))
    if found is None:
        raise incident("non_finite", "gradient norm", grad_norm, step, rows)
    quantity, value, bound = found
    raise incident("spike", quantity, value, step, rows, _highest(micro_batches, items, settings), bound)


def accumulate_gradients(
    model: Decoder,
    loss: Loss,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int = 0,
) -> tuple[float, Tensor]:
    """Leave in ``.grad`` the gradient of ``global loss sum / global_divisor``; return the loss and the sums.

    The divisor is the same on every rank and known before the first backward, so nothing depends on how rows were
    split over micro-batches and ranks.

    Raises:
        StepIncident: the global loss is not finite; on every rank, naming the examples.
    """
    parts = [own_part(batch, settings.mesh) for batch in micro_batches]
    found = _accumulate(model, loss, parts, settings, global_divisor=global_divisor, step=step)
    return found.mean, found.sums


def _accumulate(
    model: Decoder,
    loss: Loss,
    micro_batches: Sequence[PackedBatch],
    settings: StepSettings,
    *,
    global_divisor: float,
    step: int,
) -> Accumulated:
    """As :func:`accumulate_gradients`, and the losses of each micro-batch's items with their segments."""
    scale = gradient_scale(global_divisor)
    device, sources = settings.mesh.device, settings.sources
    count = sources + len(loss.figures)
    totals = torch.zeros(1 + 2 * count, dtype=torch.float64, device=device)
    extremes = torch.full((len(loss.extremes),), -math.inf, dtype=torch.float64, device=device)
    items: list[Items] = []
    for number, arrays in enumerate(micro_batches):
        batch = to_torch(with_signals(arrays, loss, "train"), device)
        synchronise_gradients(model, number == len(micro_batches) - 1)
        with settings.clock.part("forward"), autocast(device, settings.precision):
            output = run_loss(loss, model, batch)
        with settings.clock.part("backward"):
            (output.local_sum * scale).backward()
        items.append((output.values, output.segments))
        totals[0] += output.local_sum.detach()
        totals[1:] += output_sums(loss, batch, output, sources).flatten()
        for place, name in enumerate(loss.extremes):
            extremes[place] = torch.maximum(extremes[place], output.extremes[name])
        pulse.moved()
    with settings.clock.part("backward"):
        settle_gradients(model)
    total, *sums = settings.mesh.sum_over_tokens(
        totals.tolist()
    )  # the only wait for the device before the gradient norm
    if not math.isfinite(total):
        suspects = [example for pair in zip(micro_batches, items, strict=True) for example in _non_finite(*pair)]
        rows = _everywhere(_names(_all_examples(micro_batches), settings))
        raise incident("non_finite", "loss", total, step, rows, _everywhere(_names(suspects, settings)))
    mean = total / global_divisor if global_divisor else 0.0
    largest = dict(zip(loss.extremes, global_max(extremes.tolist()), strict=True)) if loss.extremes else {}
    return Accumulated(mean, torch.tensor(sums, dtype=torch.float64).view(count, 2), items, largest)


def _non_finite(batch: PackedBatch, items: Items) -> list[int]:
    """Store indices of the documents whose loss is not finite, in order; ``batch`` is of numpy arrays."""
    values, segments = (tensor.cpu() for tensor in items)
    return sorted({int(example) for example in batch.document_ids[segments[~torch.isfinite(values)].numpy()]})


def _all_examples(micro_batches: Sequence[PackedBatch]) -> list[int]:
    return [int(example) for batch in micro_batches for example in batch.document_ids if example >= 0]


def _names(examples: Sequence[int], settings: StepSettings) -> list[str]:
    return [settings.name_example(example) for example in examples]


def _everywhere(names: list[str]) -> list[str]:
    """The names of all ranks; ranks that share a row's tokens name it alike."""
    return list(dict.fromkeys(name for part in gather_objects(names) for name in part))


def _highest(micro_batches: Sequence[PackedBatch], items: Sequence[Items], settings: StepSettings) -> list[str]:
    """The documents of all ranks with the highest loss an item, the highest first."""
    means: list[tuple[float, str]] = []
    for batch, item in zip(micro_batches, items, strict=True):
        values, places = (tensor.cpu() for tensor in item)
        count = torch.bincount(places, minlength=len(batch.document_ids))
        total = torch.bincount(places, weights=values.double(), minlength=len(batch.document_ids))
        for number in count.nonzero().flatten().tolist():
            name = settings.name_example(int(batch.document_ids[number]))
            means.append((float(total[number] / count[number]), name))
    every = {pair for part in gather_objects(sorted(means)[-_NAMED:]) for pair in part}
    return [name for _, name in sorted(every, reverse=True)[:_NAMED]]
