"""What a running training job says of itself, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: what the value of a look at held-out examples is called, the lower the better, where a recipe does not name another
HELD_OUT_LOSS = "held-out loss"


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimiser step, global over all workers.

    ``loss`` is the weighted mean over the step's trained tokens; None at step 0, which only evaluates.
    ``fill`` = real tokens / row slots.
    ``data_wait_seconds`` is the part of ``step_seconds`` spent waiting for the loader.
    ``model_flops`` are those that the useful tokens need of the trained model, ``hardware_flops`` those with what was
    computed again and the forward of a frozen model beside it (``training.flops``).
    ``mfu`` and ``hfu`` hold them against the devices' peak by data sheet (a CPU's: as measured), ``mfu_measured`` the
    first against the rate of a large product in the same process; None at step 0. ``trained_tokens`` have a target.
    ``seconds`` is where the time of step ``seconds_of_step`` went, by kind (``training.timing``): data, forward,
    backward, optimizer, communication, evaluation, checkpoint, other. That is this step on a CPU, the one before on
    CUDA, where nothing waits for the clock; they sum to the whole from a step's begin to the next one's, of which
    ``step_seconds`` leaves evaluation and checkpoint out.
    ``memory_gib``: weights, gradients, optimizer, activations (``training.memory``), the most that a rank holds.
    ``held_out`` is None at steps without evaluation, else ``{"all": loss, "<source>": loss, ...}``.
    ``figures`` and ``held_out_figures`` are the loss's own by name (margins, accuracies), of the step and of the
    held-out examples.
    ``source_tokens`` and ``source_units`` (examples, or what was packed as one) are what each source gave this step.
    ``rows`` counts what became of the rows so far where training tokenises them itself: rows, refused, held_out, units.
    ``incidents`` counts the steps so far whose loss or gradient was not finite, or a spike; of one that was skipped
    ``loss`` is None and ``grad_norm`` 0.
    ``checkpoint_stall_seconds``: for how long saving held up the training, this step's save or the one before it.
    ``answers``: some of the policy's own, to be read, where it learns from them (``rl.figures.shown_answers``).
    ``event`` names what else happened: "resumed", "checkpoint", "best", "early_stop", "finished"; comma-joined.
    """

    step: int
    total_steps: int
    loss: float | None
    lr: float
    grad_norm: float
    trained_weight: float
    real_tokens: int
    slot_tokens: int
    tokens_seen: int
    step_seconds: float
    data_wait_seconds: float
    model_flops: float
    mfu: float | None
    peak_memory_gib: float
    held_out: dict[str, float] | None = None
    event: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    held_out_figures: dict[str, float] = field(default_factory=dict)
    source_loss: dict[str, float] = field(default_factory=dict)
    source_tokens: dict[str, int] = field(default_factory=dict)
    source_units: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    trained_tokens: int = 0
    hardware_flops: float = 0.0
    mfu_measured: float | None = None
    hfu: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_of_step: int = 0
    memory_gib: dict[str, float] = field(default_factory=dict)
    incidents: int = 0
    checkpoint_stall_seconds: float = 0.0
    answers: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))  # a list, where it was read back from JSON

    @property
    def fill(self) -> float:
        """Share of the row slots that hold real tokens."""
        return self.real_tokens / max(1, self.slot_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Real (non-padding) tokens per second of this step."""
        return self.real_tokens / max(1e-9, self.step_seconds)

    @property
    def trained_tokens_per_second(self) -> float:
        """Tokens with a target per second of this step."""
        return self.trained_tokens / max(1e-9, self.step_seconds)


def first_report(total_steps: int, **fields: Any) -> StepReport:
    """Of a model before its first step: nothing is trained yet. ``fields`` as those of :class:`StepReport`."""
    nothing: dict[str, Any] = {
        "lr": 0.0,
        "grad_norm": 0.0,
        "trained_weight": 0.0,
        "real_tokens": 0,
        "slot_tokens": 0,
        "tokens_seen": 0,
        "step_seconds": 0.0,
        "data_wait_seconds": 0.0,
        "model_flops": 0.0,
        "mfu": None,
        "peak_memory_gib": 0.0,
    }
    return StepReport(step=0, total_steps=total_steps, loss=None, **{**nothing, **fields})


@dataclass(frozen=True)
class TrainResult:
    """What a finished job returns: which checkpoints stand, and how it ended.

    ``held_out_is`` names what ``best_held_out`` and ``first_held_out`` are, the lower the better. ``data_end`` says
    after how many of the steps asked for the data ended; empty where it did not end before them.
    """

    step: int
    tokens_seen: int
    last_checkpoint: str
    best_checkpoint: str | None
    best_held_out: float | None
    first_held_out: float | None
    stopped_early: bool
    held_out_is: str = HELD_OUT_LOSS
    data_end: str = ""
    incidents: int = 0
