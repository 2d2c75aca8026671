"""The one training loop. SFT and everything after it differ in their loss alone.

    loader --step--> train_step --> report
                         |  every evaluate_every_steps: held-out loss, best, early stopping
                         |  every checkpoint.every_steps, at a new best, and at the end: checkpoint

The loop is a generator: it yields a report per optimiser step and returns the result. Whoever drives it, a plain
``for`` in this process or an actor on a cluster, sees the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.manager import CheckpointManager
from posttrain_lib.data.loader import LoadedStep, PackedLoader, count_steps
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.evaluation.perplexity import held_out_loss, mean_losses
from posttrain_lib.losses import build_loss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.optim import build_optimizer
from posttrain_lib.optim.schedules import lr_factor, set_lr
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.process_group import global_sum, process_group
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training.device import peak_memory_gib, pick_device, prepare_process
from posttrain_lib.training.flops import batch_flops, peak_flops
from posttrain_lib.training.state import TrainState
from posttrain_lib.training.train_step import StepOutcome, train_step

if TYPE_CHECKING:
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.training.job import TrainJob

Events = Generator[StepReport, None, TrainResult]


def train(job: TrainJob) -> Events:
    """Run one rank of a job to its end. Reports are global figures, the same on every rank.

    Raises:
        TrainingError: loss or gradient is not finite. CheckpointError: the disk said no.
        ModelError, DataError: the inputs are not what they should be.
    """
    device = pick_device(job.device, job.rank)
    prepare_process(job.train.seed, job.threads)
    with process_group(job.rank, job.world, job.rendezvous, device):
        trainer = Trainer(job, device)
        try:
            result = yield from trainer.run()
        finally:
            trainer.state.loader.close()
        return result


def load_sharded_model(spec: ModelSpec, job: TrainJob, device: torch.device) -> Decoder:
    """The model, laid over the ranks before its weights are read: no rank holds more than its share and one tensor."""
    model = build_model(spec, device="meta" if job.world > 1 else device)
    apply_parallelism(
        model, world=job.world, device=device, activation_checkpointing=job.train.activation_checkpointing
    )
    if job.world > 1:
        model.to_empty(device=device)
    load_hf_weights(model, spec, job.model_folder)
    return model


class Trainer:
    """A job's objects, and the loop over them."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        config = job.train
        self.job, self.config, self.device = job, config, device
        self.spec = spec_from_folder(job.model_folder)
        self.store = TokenStore(Path(job.train_store))
        self.held_out = TokenStore(Path(job.held_out_store))
        self.loss = build_loss(config.loss, config.loss_options)
        model = load_sharded_model(self.spec, job, device)
        self.state = TrainState(model, build_optimizer(model, config.optimizer), self._loader())
        self.total_steps = self._total_steps()
        self.notes: list[str] = []
        self.checkpoints = CheckpointManager(
            job.checkpoint_folder, config.checkpoint.keep_last, job.rank, say=self.notes.append
        )
        self.peak = peak_flops(device, config.precision)
        self.saved: Path | None = None

    def run(self) -> Events:
        """Resume if there is something to resume from, then step until the end."""
        resumed = self._resume()
        if not resumed:
            yield self._first_report()
        progress = self.state.progress
        while progress.step < self.total_steps and not progress.stopped_early:
            begun = time.perf_counter()
            loaded = self.state.loader.next_step()
            if loaded is None:
                break
            report = self._step(loaded, begun)
            if resumed:
                report = _with_event(report, "; ".join(["resumed", *self.notes]))
                resumed = False
            yield report
        return self._result()

    def _step(self, loaded: LoadedStep, begun: float) -> StepReport:
        """One optimiser step and what is due after it."""
        progress = self.state.progress
        lr = self.config.optimizer.lr * lr_factor(progress.step + 1, self.config.schedule, self.total_steps)
        set_lr(self.state.optimizer, lr)
        outcome = train_step(
            self.state.model,
            self.loss,
            self.state.optimizer,
            loaded.micro_batches,
            global_divisor=loaded.global_weight,
            world=self.job.world,
            sources=len(self.store.sources),
            precision=self.config.precision,
            clip_norm=self.config.clip_norm,
            device=self.device,
        )
        progress.step += 1
        progress.tokens_seen += loaded.real_tokens
        seconds = time.perf_counter() - begun
        events: list[str] = []
        held_out = self._evaluate(events) if self._is_due(self.config.evaluate_every_steps) else None
        if "best" in events or progress.stopped_early or self._is_due(self.config.checkpoint.every_steps):
            self.saved = self.checkpoints.save(self.state)
            events.append("checkpoint")
        return self._report(loaded, outcome, lr, seconds, held_out, events)

    def _is_due(self, every: int) -> bool:
        step = self.state.progress.step
        return step % every == 0 or step == self.total_steps

    def _evaluate(self, events: list[str]) -> dict[str, float]:
        """Held-out loss; keeps count of the best and of patience."""
        progress, stopping = self.state.progress, self.config.early_stopping
        losses = self._held_out()
        least = stopping.min_delta if stopping else 0.0
        if progress.best_held_out is None or losses["all"] < progress.best_held_out - least:
            progress.best_held_out, progress.best_step, progress.stale_evaluations = losses["all"], progress.step, 0
            events.append("best")
        else:
            progress.stale_evaluations += 1
        if stopping and progress.stale_evaluations >= stopping.patience:
            progress.stopped_early = True
            events.append("early_stop")
        return losses

    def _held_out(self) -> dict[str, float]:
        return held_out_loss(
            self.state.model,
            self.loss,
            self.held_out,
            row_tokens=self.config.row_tokens,
            batch_rows=self.config.micro_batch_rows,
            rank=self.job.rank,
            world=self.job.world,
            device=self.device,
            precision=self.config.precision,
        )

    def _report(
        self,
        loaded: LoadedStep,
        outcome: StepOutcome,
        lr: float,
        seconds: float,
        held_out: dict[str, float] | None,
        events: list[str],
    ) -> StepReport:
        own = sum(batch_flops(self.spec, batch) for batch in loaded.micro_batches)
        flops = float(global_sum(torch.tensor(own, dtype=torch.float64, device=self.device)))
        progress = self.state.progress
        if progress.step == self.total_steps or progress.stopped_early:
            events.append("finished")
        return StepReport(
            step=progress.step,
            total_steps=self.total_steps,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            trained_weight=loaded.global_weight,
            real_tokens=loaded.real_tokens,
            slot_tokens=loaded.slot_tokens,
            tokens_seen=progress.tokens_seen,
            step_seconds=seconds,
            data_wait_seconds=loaded.data_wait_seconds,
            model_flops=flops,
            mfu=None if self.peak is None else flops / (seconds * self.job.world * self.peak),
            peak_memory_gib=peak_memory_gib(self.device),
            held_out=held_out,
            event=", ".join(events),
            source_loss={
                name: value
                for name, value in mean_losses(outcome.source_sums, self.store.sources).items()
                if name != "all"
            },
        )

    def _first_report(self) -> StepReport:
        """Step 0: the held-out loss before training."""
        losses = self._held_out()
        self.state.progress.first_held_out = losses["all"]
        return StepReport(
            step=0,
            total_steps=self.total_steps,
            loss=None,
            lr=0.0,
            grad_norm=0.0,
            trained_weight=0.0,
            real_tokens=0,
            slot_tokens=0,
            tokens_seen=0,
            step_seconds=0.0,
            data_wait_seconds=0.0,
            model_flops=0.0,
            mfu=None,
            peak_memory_gib=peak_memory_gib(self.device),
            held_out=losses,
        )

    def _resume(self) -> bool:
        path = self.checkpoints.newest()
        if path is None:
            return False
        self.checkpoints.load(path, self.state)
        self.saved = path
        return True

    def _result(self) -> TrainResult:
        progress = self.state.progress
        if self.saved is None or self.saved.name != f"step-{progress.step:08d}":
            self.saved = self.checkpoints.save(self.state)
        best = self.checkpoints.best()
        return TrainResult(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            last_checkpoint=str(self.saved),
            best_checkpoint=None if best is None else str(best),
            best_held_out=progress.best_held_out,
            first_held_out=progress.first_held_out,
            stopped_early=progress.stopped_early,
        )

    def _loader(self) -> PackedLoader:
        config = self.config
        return PackedLoader(
            self.store,
            row_tokens=config.row_tokens,
            rows_per_step=config.rows_per_step,
            micro_batch_rows=config.micro_batch_rows,
            packing_buffer=config.packing_buffer,
            seed=config.seed,
            rank=self.job.rank,
            world=self.job.world,
            epochs=config.epochs,
        )

    def _total_steps(self) -> int:
        config = self.config
        if config.steps is not None:
            return int(config.steps)
        assert config.epochs is not None
        return count_steps(
            self.store.lengths,
            row_tokens=config.row_tokens,
            rows_per_step=config.rows_per_step,
            packing_buffer=config.packing_buffer,
            seed=config.seed,
            epochs=config.epochs,
        )


def _with_event(report: StepReport, event: str) -> StepReport:
    from dataclasses import replace

    return replace(report, event=", ".join(part for part in (event, report.event) if part))
