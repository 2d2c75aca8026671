"""What the controller is told: plain values, of the run file's sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain_lib.schema.rollouts import Sampling


@dataclass(frozen=True)
class HeldOut:
    """How the policy is looked at: ``prompts`` of the held-out ones, each answered greedily, and with ``samples`` above
    0 so often at the training's temperature besides (for pass@k); after every ``every_steps`` updates."""

    prompts: int = 100
    samples: int = 0
    every_steps: int = 50


@dataclass(frozen=True)
class RLSettings:
    """One *batch* is ``prompts_per_batch`` groups of ``group_size`` answers, learned in ``updates_per_batch`` optimiser
    steps, or in as many as it has groups; ``updates`` steps make the run, however many batches that takes.

    max_staleness: a batch may be asked for while so many earlier ones are not learned yet; 0 is synchronous. A sample
        is then never of weights more than so many batches old: by when it was asked for, whatever happens after.
    placement: "colocated", the engine has the policy's devices and sleeps while it learns, which needs a
        ``max_staleness`` of 0; "split", it goes on beside it.
    sampling: of training's answers. seed: of all that is drawn.
    advantage: a name of ``rl.advantages``. normalise: of ``rl.rewards.shaping``, of rewards before that; clip_reward:
        the bound of their size behind it.
    teacher_weight: of the teacher's log-probability less the sampler's, which is added to each token's advantage.
    skip_solved, skip_hopeless: a prompt is left out of the pass behind one in which at least (at most) this share of
        its answers was right; None: never.
    drop_no_signal: groups whose rewards are all equal are replaced (DAPO's dynamic sampling).
    max_refills: rounds of further prompts for a batch, in place of those dropped, and of those whose grading failed.
    mask_unfinished: answers that were cut off count in their group's mean and are not learned.
    needs_old: the loss compares with the policy before the batch's first update.
    save_every: updates between checkpoints. shown: answers of each batch kept to be read.
    """

    updates: int
    prompts_per_batch: int
    group_size: int
    sampling: Sampling
    updates_per_batch: int = 1
    max_staleness: int = 0
    placement: Literal["colocated", "split"] = "colocated"
    advantage: str = "grpo"
    normalise: str = "none"
    clip_reward: float | None = None
    teacher_weight: float = 0.0
    skip_solved: float | None = None
    skip_hopeless: float | None = None
    drop_no_signal: bool = False
    max_refills: int = 4
    mask_unfinished: bool = False
    needs_old: bool = False
    save_every: int = 50
    shown: int = 3
    seed: int = 0
    held_out: HeldOut = field(default_factory=HeldOut)

    def batches_left(self, version: int) -> int:
        """Batches that the run needs from this version on: so many at least, more where one comes out short."""
        return max(0, -(-(self.updates - version) // self.updates_per_batch))
