"""What a step that went wrong leads to: a loss or gradient that is not finite, or a spike.

    stop        nothing of the step reaches the weights, the run ends with an error
    skip        the optimiser step is not taken; step number, learning rate and data go on
    roll_back   back to the last checkpoint's weights, and on with the data behind the step that went wrong: what was
                trained on since the checkpoint is left out with it (as in PaLM, Chowdhery et al. 2022, section 5.1)

Decisions rest on figures that are the same on every rank and on what a checkpoint holds (``Progress``), so all ranks
decide alike, and a run that is cut and resumed decides as the uninterrupted one did.

Every incident is a line of ``incidents.jsonl`` in the work folder, with the rows of the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from posttrain_lib.errors import TrainingError

if TYPE_CHECKING:
    from posttrain_lib.checkpoint.manager import CheckpointManager
    from posttrain_lib.training.state import Progress, TrainState

LOG = "incidents.jsonl"
Kind = Literal["non_finite", "spike"]
#: accepted steps before a spike can be told from the beginning of training
LEAST = 8
#: a median absolute deviation times this is the standard deviation of a normal distribution
_ROBUST = 1.4826
#: a deviation below this part of the median counts as that much: a flat curve's own noise is no spike
_FLAT = 0.01
#: rows named in an error's text
_NAMED = 8


class StepIncident(TrainingError):
    """A step that must not reach the weights; the same on every rank. Raised before the optimiser has done anything.

    ``kind``, ``what`` ("loss", "gradient norm") and ``value`` say what was found, ``suspects`` the rows that it is
    likely to come from and ``rows`` all of the step, each as "source: row id".
    """

    kind: Kind = "non_finite"
    quantity: str = ""
    value: float = math.nan
    suspects: Sequence[str] = ()
    rows: Sequence[str] = ()


def incident(
    kind: Kind,
    quantity: str,
    value: float,
    step: int,
    rows: Sequence[str],
    suspects: Sequence[str] = (),
    above: str = "",
) -> StepIncident:
    """The error of a step whose loss or gradient norm is not finite, or far above those before it (``above``)."""
    named = list(suspects or rows)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    found = StepIncident(
        f"the {quantity} of step {step} {'is not finite' if kind == 'non_finite' else 'is a spike'}; "
        "the optimiser step was not taken",
        where=f"step {step}, rows {', '.join(named[:_NAMED])}{more}",
        got=value,
        expected="a finite number" if kind == "non_finite" else above,
        fix="look at those rows. With another train.incidents (skip such steps, or roll back past them) the run goes "
        "on from its last checkpoint; a lower train.optimizer.lr, a longer warm-up or a harder clip begin a new one",
    )
    found.kind, found.quantity, found.value = kind, quantity, value
    found.rows, found.suspects = rows, suspects
    return found


class IncidentPolicy:
    """Judges steps and says what an incident leads to.

    Args:
        config: ``train.incidents``, or anything with its attributes.
        log: the file of incidents. writes: on the first rank alone.
    """

    def __init__(self, config: Any, log: Path, *, writes: bool = True) -> None:
        self.config, self.log, self.writes = config, log, writes

    @property
    def rolls_back(self) -> bool:
        """Whether a run may need a checkpoint to go back to."""
        return "roll_back" in (self.config.non_finite, self.config.spike)

    def spike(self, progress: Progress, loss: float, grad_norm: float) -> tuple[str, float, str] | None:
        """(quantity, value, bound) of what lies too far above the steps before; None where nothing does."""
        config, losses = self.config, progress.recent_losses
        if config.spike == "off" or len(losses) < LEAST:
            return None
        middle = median(losses)
        deviation = _ROBUST * median(abs(value - middle) for value in losses)
        bound = middle + config.spike_deviations * max(deviation, _FLAT * abs(middle))
        if loss > bound:
            above = f"{config.spike_deviations:g} deviations above the median of {len(losses)} steps"
            return "loss", loss, f"at most {bound:.6g}, {above}"
        bound = config.spike_norm_factor * median(progress.recent_norms)
        if grad_norm > bound > 0:
            return "gradient norm", grad_norm, f"at most {bound:.6g}, {config.spike_norm_factor:g} x the median"
        return None

    def accept(self, progress: Progress, loss: float, grad_norm: float) -> None:
        """A step was taken: later ones are held against it."""
        if self.config.spike == "off":
            return
        for values, value in ((progress.recent_losses, loss), (progress.recent_norms, grad_norm)):
            values.append(value)
            del values[: -self.config.window]

    def decide(self, found: StepIncident, progress: Progress, data_step: int) -> Literal["skip", "roll_back"]:
        """Count and log an incident, and say what to do. ``data_step``: which step of the data it was, from 1.

        Raises:
            StepIncident: ``found`` itself, where the policy is to stop.
            TrainingError: it is one more than ``train.incidents.most``.
        """
        progress.incidents += 1
        action = self.config.non_finite if found.kind == "non_finite" else self.config.spike
        too_many = action != "stop" and progress.incidents > self.config.most
        self._write(found, data_step, "stop" if too_many else action)
        if too_many:
            raise TrainingError(
                f"too many steps went wrong; the last: {found.what}",
                where=found.where,
                got=f"{progress.incidents} incidents, the last of {found.value}",
                expected=f"at most {self.config.most} (train.incidents.most)",
                fix=f"look at the rows in {self.log}. If these steps follow one another, the one before the first "
                "has ruined the weights, and so have the checkpoints since: roll_back instead of skip, or a lower "
                "train.optimizer.lr in a new run. Else raise train.incidents.most: the run goes on",
            ) from found
        if action == "skip" or action == "roll_back":
            return action
        raise found

    def _write(self, found: StepIncident, data_step: int, action: str) -> None:
        """Once, however often a run is resumed before it."""
        if not self.writes:
            return
        entry = {
            "data_step": data_step,
            "kind": found.kind,
            "quantity": found.quantity,
            "value": repr(found.value),  # JSON has no infinity
            "action": action,
            "what": found.what,
            "expected": found.expected,
            "suspects": list(found.suspects),
            "rows": list(found.rows),
        }
        if entry not in read_log(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a+", encoding="utf-8") as lines:
                torn = self.log.stat().st_size and not self.log.read_bytes().endswith(b"\n")
                lines.write(("\n" if torn else "") + json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The incidents of a work folder, in order; the line that a killed process was writing is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def roll_back(state: TrainState, checkpoints: CheckpointManager, found: StepIncident) -> None:
    """Everything as in the last checkpoint, but for the data, which goes on behind the step that went wrong, and the
    count of incidents. A collective.

    Raises:
        StepIncident: there is no checkpoint.
    """
    position, count = state.loader.state(), state.progress.incidents
    if checkpoints.resume(state) is None:
        raise found
    state.loader.load_state(position)
    state.progress.incidents = count
