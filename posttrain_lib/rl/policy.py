"""The policy's rank: the model that learns, SPMD as in every other recipe, and driven from outside.

    samples --pack_samples--> this rank's micro-batches --train_step--> weights, one version later

Every rank of the job calls every method with the same arguments in the same order. What differs from
``training.loop`` is who says when: there a loader has the data and the loop the say, here a controller has both. Step,
losses, meters, incidents and checkpoints are the same objects.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.errors import ConfigError, TrainingError
from posttrain_lib.evaluation.perplexity import means_of
from posttrain_lib.losses import loss_of
from posttrain_lib.losses.policy import MISMATCH, MISMATCH_FRESH, MISMATCH_MAX
from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.optim.schedules import lr_factor, set_lr
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.rl.engine.weights import hf_weights
from posttrain_lib.rl.scoring import Scoring, score_samples
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training import pulse
from posttrain_lib.training.build import load_sharded_model, spec_of
from posttrain_lib.training.checks import check_divisor
from posttrain_lib.training.flops import relative_pair_cost
from posttrain_lib.training.incidents import StepIncident
from posttrain_lib.training.learner import make_learner
from posttrain_lib.training.train_step import StepOutcome, StepSettings, train_step

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from posttrain_lib.losses.base import Loss
    from posttrain_lib.rl.packing import PackedSamples
    from posttrain_lib.schema.rollouts import TrainSample
    from posttrain_lib.training.job import TrainJob

#: what all rollouts are called where figures are told by source
SOURCE = "rollouts"


class ControllerState:
    """What the controller knows, kept in the policy's checkpoints: both are then of one moment."""

    def __init__(self) -> None:
        self.value: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """JSON-ready; empty before the first save."""
        return self.value or {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's."""
        self.value = state


class PolicyRank:
    """One rank of the policy (``rl.roles.PolicyRole``).

    Args:
        job: which model, on which mesh, how to train it, and at which temperature rollouts are sampled; its stores are
            not looked at. ``train.steps`` is the number of updates that the schedule counts with. device: this rank's.
        most_mismatch: an update is refused where ``mismatch/kl_fresh`` is above; None: never.
        trajectory: what else of the run file the weights depend on, JSON-ready.

    Raises:
        ConfigError: the loss is none for rollouts, or of another temperature than they are sampled at, or an option
            that has no meaning here.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        job: TrainJob,
        device: torch.device,
        *,
        most_mismatch: float | None = None,
        trajectory: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        config = job.train
        self.job, self.config, self.device = job, config, device
        self.most_mismatch = most_mismatch
        self.mesh = rank_mesh(job.mesh, device)
        spec = spec_of(job)
        if isinstance(spec, HFSpec) or config.steps is None:
            raise ConfigError(
                "a policy is a definition of ours, trained for a number of updates",
                where="model.backend, train.steps",
                got=f"{job.backend}, {config.steps}",
                expected="native, and a number",
            )
        self.spec, self.updates = spec, int(config.steps)
        self.loss = loss_of(config)
        temperature = _temperature(job, self.loss)
        if "roll_back" in (config.incidents.non_finite, config.incidents.spike):
            raise ConfigError(
                "rollouts cannot be rolled back: they would be others",
                where="train.incidents",
                got="roll_back",
                fix="use skip, which leaves the update out, or stop",
            )
        pulse.beat("model")
        model = load_sharded_model(self.spec, job, self.mesh)
        self.position = ControllerState()
        self.state, self.meter, self.checkpoints, self.incidents = make_learner(
            job, self.spec, model, self.position, device, say=say, trajectory=trajectory
        )
        self.scoring = Scoring(
            config.row_tokens,
            config.micro_batch_rows,
            temperature,
            config.precision,
            relative_pair_cost(self.spec),
            config.share_prefixes,
        )

    @property
    def version(self) -> int:
        """Updates so far."""
        return self.state.progress.step

    def resume(self) -> tuple[dict[str, Any], StepReport] | None:
        """Go to the newest good checkpoint; see :class:`rl.roles.PolicyRole`."""
        pulse.beat("looking for a checkpoint")
        if self.checkpoints.resume(self.state) is None:
            return None
        assert self.state.report is not None, "a checkpoint is saved with the report of its step"
        return self.position.state(), StepReport(**self.state.report)

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        """One optimiser step.

        Raises:
            StepIncident: loss or gradient is not finite or a spike, and the run file says stop.
            TrainingError: trainer and sampler are further apart than allowed.
        """
        begun = time.perf_counter()
        progress, step = self.state.progress, self.state.progress.step + 1
        pulse.beat("training step", step)
        self.meter.clock.begin(step)
        with self.meter.clock.part("data"):
            packed = self.scoring.pack(self.state.model, self.mesh, samples)
        lr = self.config.optimizer.lr * lr_factor(step, self.config.schedule, self.updates)
        set_lr(self.state.optimizer, lr)
        batches = packed.micro_batches
        divisors = sum(self.loss.divisor(batch) for batch in batches)
        divisor, *work = self.mesh.sum_over_rows([divisors, *self.meter.work(batches)])
        check_divisor(self.loss, divisor, batches)
        with self.meter.step(step):
            outcome = self._guarded(samples, packed, divisor)
        progress.step = step
        progress.tokens_seen += packed.tokens
        return self._report(packed, outcome, lr, work, time.perf_counter() - begun, divisor)

    def logprobs(self, samples: Sequence[TrainSample], *, temperature: float | None = None) -> list[np.ndarray]:
        """Float32 [N] for each sample, of its trained tokens; None: at the temperature of sampling."""
        pulse.beat("log-probabilities", self.version)
        scoring = self.scoring
        if temperature is not None:
            scoring = dataclasses.replace(scoring, temperature=temperature)
        return score_samples(self.state.model, self.mesh, samples, scoring)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By Hugging Face name, adapters merged; whole on every rank, one tensor at a time."""
        return hf_weights(self.state.model, self.spec)

    def save(self, controller: dict[str, Any], report: StepReport, *, wait: bool = False) -> None:
        """A checkpoint of this version."""
        pulse.beat("checkpoint", self.version)
        progress, held_out = self.state.progress, report.held_out
        if held_out is not None and (progress.best_held_out is None or held_out["all"] < progress.best_held_out):
            progress.best_held_out, progress.best_step = held_out["all"], progress.step
        self.position.value = controller
        self.state.report = dataclasses.asdict(report)
        self.checkpoints.save(self.state, wait=wait)

    def result(self) -> TrainResult:
        """What the run came to, once it is saved."""
        progress, path = self.state.progress, self.checkpoints.path
        return TrainResult(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            last_checkpoint=str(path(progress.step)),
            best_checkpoint=None if progress.best_step is None else str(path(progress.best_step)),
            best_held_out=progress.best_held_out,
            first_held_out=None,  # the controller's to say
            stopped_early=False,
            incidents=progress.incidents,
        )

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.checkpoints.close()

    def _guarded(self, samples: Sequence[TrainSample], packed: PackedSamples, divisor: float) -> StepOutcome:
        """The step's outcome; of an incident that the run file wants skipped, one without a loss."""
        state, policy = self.state, self.incidents
        step = state.progress.step + 1
        settings = StepSettings(
            mesh=self.mesh,
            precision=self.config.precision,
            clip_norm=self.config.clip_norm,
            sources=1,
            name_example=lambda number: f"group {samples[number].group}, sample {samples[number].index}",
            clock=self.meter.clock,
        )
        try:
            outcome = train_step(
                state.model,
                self.loss,
                state.optimizer,
                packed.micro_batches,
                settings,
                global_divisor=divisor,
                step=step,
                spike=partial(policy.spike, state.progress),
                judge=self._check_mismatch,
                before_update=self.checkpoints.before_update,
            )
        except StepIncident as found:
            policy.decide(found, state.progress, step)
            sums = torch.zeros(1 + len(self.loss.figures), 2, dtype=torch.float64)
            return StepOutcome(None, 0.0, sums, str(found.what))
        if outcome.loss is not None:
            policy.accept(state.progress, outcome.loss, outcome.grad_norm)
        return outcome

    def _check_mismatch(self, outcome: StepOutcome) -> None:
        """Refuse an update on samples of which the trainer thinks quite otherwise than the sampler did, with the same
        weights: how far others are from these is no fault, and the clip's and the correction's matter."""
        found = means_of(outcome.sums, self.loss, [SOURCE]).figures.get(MISMATCH_FRESH)
        if self.most_mismatch is None or found is None or found <= self.most_mismatch:
            return
        raise TrainingError(
            "the rollout engine and the trainer disagree about the sampled tokens; the update was not taken",
            where=f"update {self.version + 1}",
            got=f"a KL of {found:.4g} a token of answers that are not stale; the largest log ratio of all "
            f"{outcome.extremes.get(MISMATCH_MAX, 0):.4g}",
            expected=f"at most {self.most_mismatch:g}",
            fix="look for another precision or template in the engine; or allow more",
        )

    def _report(
        self,
        packed: PackedSamples,
        outcome: StepOutcome,
        lr: float,
        work: list[float],
        seconds: float,
        divisor: float,
    ) -> StepReport:
        progress = self.state.progress
        means = means_of(outcome.sums, self.loss, [SOURCE])
        figures = means.figures | outcome.extremes if means.figures else {}
        if squared := figures.pop(MISMATCH[2], None):
            figures["mismatch/effective_share"] = figures[MISMATCH[1]] ** 2 / squared
        else:
            figures.pop(MISMATCH_MAX, None)
        return StepReport(
            step=progress.step,
            total_steps=self.updates,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            trained_weight=divisor,
            real_tokens=packed.tokens,
            slot_tokens=packed.slots,
            tokens_seen=progress.tokens_seen,
            step_seconds=seconds,
            data_wait_seconds=0.0,
            event=f"skipped: {outcome.skipped}" if outcome.skipped else "",
            figures=figures,
            **self.meter.figures(work, seconds),
            checkpoint_stall_seconds=self.checkpoints.take_stall_seconds(),
            incidents=progress.incidents,
        )


def _temperature(job: TrainJob, loss: Loss) -> float:
    """That rollouts are sampled at, and the loss's. A loss of one's own that has none is believed to know it."""
    assert job.rollouts is not None, "a job of rollouts"
    sampled = job.rollouts.settings.sampling.temperature
    own = getattr(loss, "temperature", sampled)
    if own != sampled:
        raise ConfigError(
            "the loss divides logits by another temperature than answers are sampled at: every ratio would be wrong",
            where="train.loss_options.temperature",
            got=own,
            expected=f"{sampled} (grpo.rollout.temperature)",
            fix=f"set train.loss_options.temperature: {sampled}",
        )
    return sampled
