"""The one training loop. SFT and everything after it differ in their loss alone.

    loader --step--> train_step --> report
                         |  every evaluate_every_steps: held-out loss, best, early stopping
                         |  every checkpoint.every_steps, at a new best, and at the end: checkpoint

The loop is a generator: it yields a report per optimiser step and returns the result. Whoever drives it, a plain
``for`` in this process or an actor on a cluster, sees the same thing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posttrain_lib.data.live_feed import LiveFeed
from posttrain_lib.data.loader import LoadedStep
from posttrain_lib.data.store_feed import StoreFeed, feed_for
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import TrainingError
from posttrain_lib.evaluation.perplexity import Means, held_out_loss, means_of
from posttrain_lib.losses import loss_of
from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.models.spec import check_prefixes
from posttrain_lib.optim.schedules import lr_factor, set_lr
from posttrain_lib.parallel.compilation import check_compiler
from posttrain_lib.parallel.context import check_context
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.parallel.process_group import global_max, process_group
from posttrain_lib.schema.reports import StepReport, TrainResult, first_report
from posttrain_lib.training import pulse
from posttrain_lib.training.build import build_loader, live_feed, load_sharded_model, planned_steps, spec_of
from posttrain_lib.training.checks import (
    check_divisor,
    check_ids,
    check_kind,
    check_margins,
    check_sources,
    check_vocabulary,
    check_warmup,
)
from posttrain_lib.training.companions import attach_companion, frozen_spec, load_frozen
from posttrain_lib.training.device import peak_memory_gib, pick_device, reproducible
from posttrain_lib.training.flops import relative_pair_cost
from posttrain_lib.training.incidents import StepIncident, roll_back
from posttrain_lib.training.learner import make_learner
from posttrain_lib.training.preemption import preempted, stop_agreed
from posttrain_lib.training.train_step import StepOutcome, StepSettings, train_step

if TYPE_CHECKING:
    from posttrain_lib.data.planner import Feed
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.training.job import TrainJob

Events = Generator[StepReport, None, TrainResult]


def train(job: TrainJob) -> Events:
    """Run one rank of a job to its end. Reports are global figures, the same on every rank but for its clock.

    Raises:
        ConfigError: this machine cannot compile what is to be compiled.
        TrainingError: loss or gradient is not finite. CheckpointError: the disk said no.
        ModelError, DataError: the inputs are not what they should be.
    """
    pulse.beat("process group")
    device = pick_device(job.device, job.rank)
    if job.train.compile != "none":
        check_compiler(device)
    with reproducible(job.train.seed, job.threads), process_group(job.rank, job.world, job.rendezvous, device):
        trainer = Trainer(job, device)
        try:
            result = yield from trainer.run()
        finally:
            trainer.loader.close()
            trainer.checkpoints.close()
        return result


class Trainer:
    """A job's objects, and the loop over them."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        config = job.train
        self.job, self.config, self.device = job, config, device
        self.stopping = False
        pulse.beat("data")
        self.mesh = rank_mesh(job.mesh, device)
        self.spec = spec_of(job)
        self.store = TokenStore(Path(job.train_store))
        self.held_out = TokenStore(Path(job.held_out_store))
        self.loss = loss_of(config)
        check_kind(self.store, self.loss)
        check_margins(self.store, self.loss)
        check_sources(self.store, self.held_out)
        frozen = frozen_spec(self.loss, job, self.spec)
        for spec in (self.spec, frozen):  # both run on the same batches
            if spec is not None:
                self._check_batches(spec)
        self.feed: Feed
        if job.live is None:
            self.feed = stored = feed_for(self.store, config)
            self.total_steps = planned_steps(stored, config)
        else:
            # It starts its processes: they load the tokenizer while this one loads the model.
            self.feed, self.total_steps = live_feed(job.live, job), int(config.steps or 0)
        self.loader = build_loader(  # before the model: both load side by side
            self.feed,
            config,
            rank=self.mesh.data_rank,
            world=job.mesh.data_degree,
            pair_cost=relative_pair_cost(self.spec),
            background=job.loader_workers > 0,
        )
        try:
            check_warmup(config, self.total_steps)
            pulse.beat("model")
            model = load_sharded_model(self.spec, job, self.mesh)
        except BaseException:
            self.loader.close()
            raise
        attach_companion(
            self.loss,
            job.companion,
            {"train": self.store, "held_out": self.held_out},
            partial(load_frozen, job, self.mesh),
        )
        self.notes: list[str] = [note for note in [self.data_end()] if note]
        self.state, self.meter, self.checkpoints, self.incidents = make_learner(
            job, self.spec, model, self.loader, device, say=self.notes.append, frozen=frozen
        )
        self.settings = StepSettings(
            mesh=self.mesh,
            precision=config.precision,
            clip_norm=config.clip_norm,
            sources=len(self.feed.sources),
            name_example=self.feed.name_example,
            clock=self.meter.clock,
        )

    def _check_batches(self, spec: ModelSpec | HFSpec) -> None:
        """That a model can run on the job's batches."""
        job, config = self.job, self.config
        check_vocabulary(spec, self.store, self.held_out)
        longest = self.store.longest if job.live is None else job.live.config.max_example_tokens
        if not isinstance(spec, HFSpec):
            check_prefixes(spec.config, config.share_prefixes, longest)
            check_context(spec.config, job.mesh.context, row_tokens=config.row_tokens, longest=longest)

    def data_end(self) -> str:
        """That the data ends before the steps asked for, and what there is of it; empty where it does not, or where
        rows that are read as training goes have not told yet."""
        asked = self.config.steps
        if asked is None or self.total_steps >= asked:
            return ""
        supplies = self.feed.supplies if isinstance(self.feed, StoreFeed) else []
        given = [
            f"{name}: {examples:,} examples{'' if passes == 1 else f', {passes:g} times'}"
            for name, examples, passes in supplies
        ]
        what = f" ({'; '.join(given)})" if given else ""
        return f"the data ends after {self.total_steps:,} of the {asked:,} steps asked for{what}"

    def run(self) -> Events:
        """Resume if there is something to resume from, then step until the end."""
        pulse.beat("looking for a checkpoint")
        yield self._resume() or self._first_report()
        while not self._is_over():
            begun = time.perf_counter()
            pulse.beat("waiting for data", self.state.progress.step + 1)
            self.meter.clock.begin(self.state.progress.step + 1)
            with self.meter.clock.part("data"):
                loaded = self.loader.next_step()
            if loaded is None:
                raise TrainingError(
                    "the training data ended early",
                    where=f"step {self.state.progress.step}",
                    expected=f"{self.total_steps} steps",
                )
            yield self._step(loaded, begun)
            if self.stopping and not self._is_over():
                raise preempted(self.state.progress.step)
        if isinstance(self.feed, LiveFeed):
            self.feed.consumed(self.loader.state())
        return self._result()

    def _resume(self) -> StepReport | None:
        """Go to the newest good checkpoint; its own report again, None where there is none."""
        if self.checkpoints.resume(self.state) is None:
            return None
        assert self.state.report is not None, "a checkpoint is saved with the report of its step"
        self.state.progress.stopped_early = self._patience_is_over()  # by today's patience: it may have changed
        report = StepReport(**self.state.report)
        if report.step == report.total_steps:  # where the data ends was known there alone: live, or steps left out
            self.total_steps = report.total_steps
        return dataclasses.replace(report, event=", ".join(["resumed", *self.notes]))

    def _first_report(self) -> StepReport:
        """Step 0: the held-out loss before training."""
        progress = self.state.progress
        held_out = self._held_out()
        progress.first_held_out = progress.patience_held_out = held_out.losses["all"]
        report = first_report(
            self.total_steps,
            peak_memory_gib=max(global_max([peak_memory_gib(self.device)])),
            held_out=held_out.losses,
            held_out_figures=held_out.figures,
            event=", ".join(self.notes),
        )
        if self.incidents.rolls_back:  # there is always something to go back to
            self.state.report = dataclasses.asdict(report)
            self.checkpoints.save(self.state)
        return report

    def _step(self, loaded: LoadedStep, begun: float) -> StepReport:
        """One optimiser step and what is due after it."""
        state, progress = self.state, self.state.progress
        pulse.beat("training step")
        if self.job.live is not None:
            check_ids(self.spec, loaded)
        lr = self.config.optimizer.lr * lr_factor(progress.step + 1, self.config.schedule, self.total_steps)
        set_lr(state.optimizer, lr)
        divisors = (self.loss.divisor(batch) for batch in loaded.micro_batches)
        divisor, *work = self.mesh.sum_over_rows([sum(divisors), *self.meter.work(loaded.micro_batches)])
        check_divisor(self.loss, divisor, loaded.micro_batches)
        with self.meter.step(progress.step + 1):
            outcome = self._guarded(loaded, divisor)
        if isinstance(outcome, StepReport):
            return outcome
        progress.step += 1
        if loaded.last:  # a mixture may end before the steps do; a live one tells only here
            self.total_steps = progress.step
        progress.tokens_seen += loaded.real_tokens
        seconds = time.perf_counter() - begun
        held_out = self._held_out() if self._is_due(self.config.evaluate_every_steps) else None
        events = [f"skipped: {outcome.skipped}"] if outcome.skipped else []
        events += [] if held_out is None else self._judge(held_out.losses["all"])
        self.stopping = stop_agreed()
        due = self.stopping or self._is_due(self.config.checkpoint.every_steps)
        saves = "best" in events or progress.stopped_early or due
        events += ["checkpoint"] if saves else []
        events += ["finished"] if self._is_over() else []
        if loaded.last and isinstance(self.feed, LiveFeed) and (told := self.data_end()):
            events.append(told)
        report = self._report(loaded, outcome, lr, work, seconds, held_out, events)
        if saves:
            pulse.beat("checkpoint")
            state.report = dataclasses.asdict(report)
            with self.meter.clock.part("checkpoint"):
                self.checkpoints.save(state, wait=self.stopping or self._is_over())
            stalled = report.checkpoint_stall_seconds + self.checkpoints.take_stall_seconds()
            report = dataclasses.replace(report, checkpoint_stall_seconds=stalled, **self.meter.split())
        return report

    def _guarded(self, loaded: LoadedStep, divisor: float) -> StepOutcome | StepReport:
        """The step's outcome, or the report of the checkpoint that it made the run go back to."""
        state, policy = self.state, self.incidents
        try:
            outcome = train_step(
                state.model,
                self.loss,
                state.optimizer,
                loaded.micro_batches,
                self.settings,
                global_divisor=divisor,
                step=state.progress.step + 1,
                spike=partial(policy.spike, state.progress),
                before_update=self.checkpoints.before_update,
            )
        except StepIncident as found:
            if policy.decide(found, state.progress, loaded.step) == "skip":
                return StepOutcome(None, 0.0, torch.zeros(self._sum_rows(), 2, dtype=torch.float64), str(found.what))
            roll_back(state, self.checkpoints, found)
            if loaded.last:
                self.total_steps = state.progress.step
            assert state.report is not None, "a checkpoint is saved with the report of its step"
            report = StepReport(**state.report)
            return dataclasses.replace(
                report,
                event=f"rolled back: {found.what}",
                incidents=state.progress.incidents,
                total_steps=self.total_steps,
            )
        if divisor and outcome.loss is not None:
            policy.accept(state.progress, outcome.loss, outcome.grad_norm)
        return outcome

    def _is_due(self, every: int) -> bool:
        step = self.state.progress.step
        return step % every == 0 or step == self.total_steps

    def _is_over(self) -> bool:
        return self.state.progress.stopped_early or self.state.progress.step >= self.total_steps

    def _sum_rows(self) -> int:
        return self.settings.sources + len(self.loss.figures)

    def _held_out(self) -> Means:
        pulse.beat("held-out loss")
        with self.meter.clock.part("evaluation"):
            means = held_out_loss(
                self.state.model,
                self.loss,
                self.held_out,
                row_tokens=self.config.row_tokens,
                batch_rows=self.config.micro_batch_rows,
                mesh=self.mesh,
                precision=self.config.precision,
                observe=lambda _batch, _output: pulse.moved(),
            )
        if not math.isfinite(means.losses["all"]):
            raise TrainingError(
                "the held-out loss is not finite",
                where=f"after step {self.state.progress.step}",
                got=means.losses,
                fix="look at the sources named; lower train.optimizer.lr if the training loss was rising",
            )
        return means

    def _judge(self, held_out: float) -> list[str]:
        """Keep count of the best and of patience. The best is the lowest; patience wants it lower by ``min_delta``."""
        progress, stopping = self.state.progress, self.config.early_stopping
        events = []
        if progress.best_held_out is None or held_out < progress.best_held_out:
            progress.best_held_out, progress.best_step = held_out, progress.step
            events.append("best")
        least = stopping.min_delta if stopping else 0.0
        if progress.patience_held_out is None or held_out < progress.patience_held_out - least:
            progress.patience_held_out, progress.stale_evaluations = held_out, 0
        else:
            progress.stale_evaluations += 1
        progress.stopped_early = self._patience_is_over()
        return [*events, *(["early_stop"] if progress.stopped_early else [])]

    def _patience_is_over(self) -> bool:
        stopping = self.config.early_stopping
        return stopping is not None and self.state.progress.stale_evaluations >= stopping.patience

    def _report(
        self,
        loaded: LoadedStep,
        outcome: StepOutcome,
        lr: float,
        work: list[float],
        seconds: float,
        held_out: Means | None,
        events: list[str],
    ) -> StepReport:
        sources = self.feed.sources
        means = means_of(outcome.sums, self.loss, sources)
        return StepReport(
            step=self.state.progress.step,
            total_steps=self.total_steps,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            trained_weight=loaded.global_weight,
            real_tokens=loaded.real_tokens,
            slot_tokens=loaded.slot_tokens,
            tokens_seen=self.state.progress.tokens_seen,
            step_seconds=seconds,
            data_wait_seconds=loaded.data_wait_seconds,
            held_out=None if held_out is None else held_out.losses,
            held_out_figures={} if held_out is None else held_out.figures,
            figures=means.figures | outcome.extremes,
            event=", ".join(events),
            source_loss={name: means.losses[name] for name in sources if name in means.losses},
            source_tokens=dict(zip(sources, loaded.source_tokens.tolist(), strict=True)),
            source_units=dict(zip(sources, loaded.source_units.tolist(), strict=True)),
            rows=loaded.rows,
            **self.meter.figures(work, seconds),
            checkpoint_stall_seconds=self.checkpoints.take_stall_seconds(),
            incidents=self.state.progress.incidents,
        )

    def _result(self) -> TrainResult:
        progress = self.state.progress
        return TrainResult(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            last_checkpoint=str(self.checkpoints.path(progress.step)),
            best_checkpoint=None if progress.best_step is None else str(self.checkpoints.path(progress.best_step)),
            best_held_out=progress.best_held_out,
            first_held_out=progress.first_held_out,
            stopped_early=progress.stopped_early,
            data_end=self.data_end(),
            incidents=progress.incidents,
        )
