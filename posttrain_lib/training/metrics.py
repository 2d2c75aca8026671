"""The figures of a step besides its loss: FLOPs and shares of peaks, where the time went, what holds memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.parallel.process_group import global_max, global_sum
from posttrain_lib.training.device import peak_memory_gib
from posttrain_lib.training.flops import FlopCount, Recomputing, device_kind, half_precision
from posttrain_lib.training.memory import MemoryMeter
from posttrain_lib.training.peaks import Peaks
from posttrain_lib.training.profiling import StepProfiler
from posttrain_lib.training.timing import StepClock

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.hf_spec import HFSpec
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.schema.batches import PackedBatch
    from posttrain_lib.training.job import TrainJob

_MEMORY = ("weights", "gradients", "optimizer", "activations")


class StepMeter:
    """Measures the steps of one rank of a job. All ranks make one, and call :meth:`figures`, at the same time.

    ``frozen``: the model that runs beside the trained one in every step, if any.
    """

    def __init__(
        self,
        job: TrainJob,
        spec: ModelSpec | HFSpec,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        frozen: ModelSpec | HFSpec | None = None,
    ) -> None:
        config = job.train
        self.device = device
        self.clock = StepClock(device, communication=job.world > 1)
        compiled = config.compile != "none"
        # compiled and recomputed blocks keep their tensors where autograd does not show them
        self.shows_saved = not compiled and config.activation_checkpointing == "none"
        self.count = FlopCount.of(
            spec,
            job.lora,
            Recomputing(
                config.activation_checkpointing, compiled, device_kind(device), half_precision(config.precision)
            ),
        )
        self.frozen = None if frozen is None else FlopCount.of_frozen(frozen)
        own = Peaks.of(device, config.precision)
        best, measured = global_sum([own.best, own.measured])
        self.peaks = Peaks(None if own.sheet is None else best, measured, own.source)
        self.memory = MemoryMeter(model, optimizer, device)
        self.profiler = StepProfiler(config.profile, job.work_dir, rank=job.rank, device=device)

    def work(self, batches: Sequence[PackedBatch]) -> list[float]:
        """[model FLOPs, hardware FLOPs, trained tokens] of this rank's micro-batches, to be summed over rows."""
        flops = self.count.batches(batches)
        if self.frozen is not None:
            flops += self.frozen.batches(batches)
        return [flops.model, flops.hardware, float(sum(len(batch.supervised_index) for batch in batches))]

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the forward, backward and update of step ``number``."""
        with (
            self.profiler.step(number),
            self.memory.first_step(saved_tensors=self.shows_saved),
            self.clock.waits(),
        ):
            yield

    def figures(self, work: Sequence[float], seconds: float) -> dict[str, Any]:
        """Fields of the step's report. ``work``: :meth:`work`'s, summed; ``seconds``: of the step, here."""
        model, hardware, trained = work
        if self.peaks.sheet is None:
            # Nothing computes faster than its peak: where the measured one was taken beside other work, this is nearer.
            fastest = max(self.peaks.measured, hardware / seconds)
            self.peaks = dataclasses.replace(self.peaks, measured=fastest)
        sizes = self.memory.by_kind()
        peak, *held = global_max([peak_memory_gib(self.device), *(sizes.get(kind, 0.0) for kind in _MEMORY)])
        return {
            "model_flops": model,
            "hardware_flops": hardware,
            "mfu": model / (seconds * self.peaks.best),
            "mfu_measured": model / (seconds * self.peaks.measured),
            "hfu": hardware / (seconds * self.peaks.best),
            "trained_tokens": int(trained),
            "peak_memory_gib": peak,
            "memory_gib": {kind: size for kind, size in zip(_MEMORY, held, strict=True) if kind in sizes},
            **self.split(),
        }

    def split(self) -> dict[str, Any]:
        """Fields of the report that say where the time went so far; asked again when what follows it is done."""
        split = self.clock.split()
        return {} if split is None else {"seconds": split.seconds, "seconds_of_step": split.step}
