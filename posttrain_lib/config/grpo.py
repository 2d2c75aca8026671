"""The ``grpo`` section: reinforcement learning by groups of answers, and the warm start before it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section
from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.objectives import Objective
from posttrain_lib.config.origin import ModelOrigin
from posttrain_lib.config.train import TrainConfig

#: what ``rl.figures`` reports as ``reward/<name>`` of a batch itself, beside the parts by title
REWARD_FIGURES = frozenset({"mean", "std", "group_std", "failed"})


class RewardTerm(Section):
    """One grader. The reward of an answer is the sum of its graders' values times their weights."""

    name: str = Field(description="a name in posttrain_lib.rl.rewards, or module:attribute of a function or class")
    title: str | None = Field(None, min_length=1, description="name of its part of the reward; default: its name")
    weight: float = Field(1.0, description="0: graded and shown, and no part of the reward")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the grader")
    deadline_seconds: float = Field(10.0, gt=0, description="a grading that takes longer is ended and costs its answer")

    @property
    def shown_as(self) -> str:
        """Its title."""
        return self.title or self.name.rpartition(":")[2]


class Rollout(Section):
    """The engine that answers prompts, and how."""

    engine: str = Field("embedded", description="a name in posttrain_lib.rl.run.ENGINES, or module:attribute")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the engine")
    max_new_tokens: int = Field(256, ge=1, description="of one answer")
    temperature: float = Field(1.0, gt=0, description="of training's answers")
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="an answer ends behind any of them, besides at its turn's end"
    )
    max_mismatch: float | None = Field(
        0.1,
        gt=0,
        description="KL a token between engine and trainer with the same weights, over the batch's answers without "
        "staleness, above which the run stops (with batches ahead few answers are such); null: never",
    )
    max_canary_difference: float | None = Field(
        None,
        gt=0,
        description="between engine's and trainer's log-probs of fixed tokens, checked at every push; "
        "null: 0.05, and 0.5 where train.precision is bf16",
    )


class EnvironmentConfig(Section):
    """What answers the policy within an episode, turn by turn. ``rollout.max_new_tokens`` are then of one turn."""

    name: str = Field(description="a name in posttrain_lib.rl.environments, or module:attribute of a class")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    max_turns: int = Field(8, ge=1, description="turns of the policy in an episode")
    max_tokens: int | None = Field(
        None, ge=2, description="of a whole episode, prompt included; default: train.row_tokens"
    )
    deadline_seconds: float = Field(
        10.0, gt=0, description="a call of the environment that takes longer is left and costs its episode"
    )


class ConstraintConfig(Section):
    """Which tokens may be sampled; the trainer's log-probabilities are then among them, too."""

    name: str = Field(description="a name in posttrain_lib.rl.constrain, or module:attribute of what makes one")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments beside the tokenizer")


class FrozenPolicy(Section):
    """The model that the policy is held near to; it runs beside it."""

    kept: Literal["live"] = "live"
    path: str | None = Field(
        None, description="named as model.path names a model; default: the model that the policy starts as"
    )
    origin: ModelOrigin | None = Field(None, description="written by the run: what made the model that path named")


class RolloutTeacher(FrozenPolicy):
    """The model that the policy learns from at every token of its own answers (on-policy distillation)."""

    weight: float = Field(1.0, gt=0, description="of its log-probability less the policy's, in a token's advantage")


class HeldOutPrompts(Section):
    """How the policy is looked at while it learns."""

    prompts: int = Field(100, ge=0, description="of the held-out ones, answered greedily; 0: none")
    samples: int = Field(0, ge=0, description="further answers to each, drawn as in training, for pass@k")
    every_steps: int = Field(25, ge=1, description="updates between two looks")


class WarmStart(Section):
    """Supervised fine-tuning before the first rollout, so that there is something to reward."""

    data: DataConfig
    train: TrainConfig


class GRPO(Objective):
    """Policy gradients from groups of graded answers: GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO."""

    beside: ClassVar[frozenset[str]] = frozenset(
        {
            "prompts_per_step",
            "group_size",
            "updates_per_batch",
            "max_staleness",
            "placement",
            "advantage",
            "drop_no_signal",
            "max_refills",
            "mask_unfinished",
            "rewards",
            "rollout",
            "environment",
            "constraint",
            "reference",
            "teacher",
            "normalise",
            "clip_reward",
            "skip_solved",
            "skip_hopeless",
            "held_out",
            "warm_start",
            "grader_processes",
            "shown_answers",
        }
    )

    rewards: tuple[RewardTerm, ...] = Field(min_length=1, description="with a teacher, one may have weight 0")
    prompts_per_step: int = Field(16, ge=1, description="prompts of one batch, each answered group_size times")
    group_size: int = Field(8, ge=1)
    updates_per_batch: int = Field(1, ge=1, description="optimiser steps that a batch is learned in")
    max_staleness: int = Field(
        0, ge=0, description="batches asked for ahead of the one that is learned; 0: rollout and training take turns"
    )
    placement: Literal["colocated", "split"] | None = Field(
        None, description="colocated: the engine has the policy's devices, and sleeps while it learns; split: a device "
        "of its own where there is one, and no sleep; default: colocated where max_staleness is 0"
    )  # fmt: skip
    advantage: str = Field(
        "grpo", description="a name in posttrain_lib.rl.advantages, verl:<name> of one of verl's, or module:attribute"
    )
    objective: Literal["clip", "cispo", "reinforce"] = "clip"
    ratio: Literal["token", "sequence"] = Field("token", description="sequence: GSPO")
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0, description="above clip_low: DAPO's higher clip")
    dual_clip: float | None = Field(None, gt=1)
    aggregate: Literal["token", "sequence", "constant"] = Field(
        "token", description="what weighs the same: every token of the batch, every answer, or every answer as if it "
        "had rollout.max_new_tokens tokens (Dr. GRPO)"
    )  # fmt: skip
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_weight: float = Field(0.0, ge=0, description="of the KL to the reference, in the loss")
    kl_unbiased: bool = Field(
        False, description="each token's KL is weighted by the policy's ratio to the one that sampled (DeepSeek-V3.2)"
    )
    entropy_bonus: float = Field(0.0, ge=0)
    correction: Literal["truncate", "mask"] | None = Field(
        None, description="importance weights of the trainer's policy over the engine's: cut at correction_most, or "
        "tokens beyond it left out"
    )  # fmt: skip
    correction_most: float = Field(2.0, ge=1)
    normalise: Literal["none", "group", "batch"] = Field("none", description="rewards, before advantages are taken")
    clip_reward: float | None = Field(None, gt=0, description="bound of a reward's size, behind normalise")
    skip_solved: float | None = Field(
        None, gt=0, le=1, description="a prompt is left out of the pass behind one in which at least this share of its "
        "answers was right"
    )  # fmt: skip
    skip_hopeless: float | None = Field(None, ge=0, lt=1, description="the same, where at most this share was right")
    drop_no_signal: bool = Field(False, description="groups whose answers all have one reward are replaced (DAPO)")
    max_refills: int = Field(
        4, ge=1, description="rounds of further prompts for a batch, in place of groups dropped or without a grade"
    )
    mask_unfinished: bool = Field(False, description="answers cut off by rollout.max_new_tokens are not learned from")
    rollout: Rollout = Rollout()
    environment: EnvironmentConfig | None = Field(None, description="default: an answer is one completion")
    constraint: ConstraintConfig | None = Field(None, description="default: any token may be sampled")
    reference: FrozenPolicy = FrozenPolicy()
    teacher: RolloutTeacher | None = None
    held_out: HeldOutPrompts = HeldOutPrompts()
    warm_start: WarmStart | None = None
    grader_processes: int = Field(1, ge=1, description="processes that grade")
    shown_answers: int = Field(3, ge=0, description="prompts of each batch whose answers are kept to be read")

    def loss(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the loss."""
        names = (
            "objective", "ratio", "clip_low", "clip_high", "dual_clip", "aggregate", "kl", "kl_weight",
            "kl_unbiased", "entropy_bonus", "correction", "correction_most",
        )  # fmt: skip
        horizon = self.rollout.max_new_tokens if self.aggregate == "constant" else None
        return "policy", {
            **{name: getattr(self, name) for name in names},
            "horizon": horizon,
            "temperature": self.rollout.temperature,
        }

    @property
    def placed(self) -> Literal["colocated", "split"]:
        """The placement, its default known."""
        return self.placement or ("split" if self.max_staleness else "colocated")

    @property
    def needs_old(self) -> bool:
        """Whether a batch is learned in several updates, of which later ones look back to the first."""
        return self.updates_per_batch > 1

    @model_validator(mode="after")
    def _parts_agree(self) -> GRPO:
        titles = [term.shown_as for term in self.rewards]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"two rewards are called {twice[0]!r}: give them titles")
        if taken := sorted(REWARD_FIGURES.intersection(titles)):
            raise ValueError(f"reward/{taken[0]} is a figure of the whole batch: give the reward another title")
        if self.teacher is None and not any(term.weight for term in self.rewards):
            raise ValueError("all rewards have weight 0: nothing would be learned")
        if self.teacher is not None and self.teacher.path is None:
            raise ValueError("a teacher needs a path: the model that the policy starts as has nothing to teach it")
        if self.updates_per_batch > self.prompts_per_step:
            raise ValueError(
                f"updates_per_batch ({self.updates_per_batch}) is above prompts_per_step ({self.prompts_per_step}): an "
                "update learns from whole groups"
            )
        solved, hopeless = self.skip_solved, self.skip_hopeless
        if solved is not None and hopeless is not None and solved <= hopeless:
            raise ValueError(
                f"skip_solved ({solved:g}) is not above skip_hopeless ({hopeless:g}): every prompt would be left out"
            )
        if self.kl_unbiased and not self.kl_weight:
            raise ValueError("kl_unbiased weighs the KL of kl_weight: set that above 0, or leave kl_unbiased out")
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(f"dual_clip is of objective clip, and {self.objective} does not read it: leave it out")
        if self.ratio == "sequence" and self.objective == "reinforce":
            raise ValueError("objective reinforce has no ratio: leave ratio: sequence out, or set clip or cispo")
        if self.placement == "colocated" and self.max_staleness:
            raise ValueError(
                "an engine that sleeps while the policy learns asks nothing ahead: set max_staleness: 0, or placement: "
                "split"
            )
        alone = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
        if self.group_size == 1 and self.advantage in alone:
            raise ValueError(
                f"advantage {self.advantage} compares an answer with others to its prompt: set group_size to 2 or "
                "more, or advantage: reinforce_plus_plus"
            )
        if self.group_size == 1 and self.normalise == "group":
            raise ValueError(
                "normalise: group compares a reward with others to its prompt, and with group_size 1 makes 0 of all: "
                "set group_size to 2 or more, or normalise: batch"
            )
        batchwise = self.advantage == "reinforce_plus_plus" or self.normalise == "batch"
        if self.group_size * self.prompts_per_step == 1 and batchwise and self.teacher is None:
            raise ValueError(
                "a batch of one answer is compared with nothing, and every advantage is 0: set prompts_per_step to 2 "
                "or more, or group_size"
            )
        if self.group_size == 1 and self.drop_no_signal:
            raise ValueError(
                "drop_no_signal leaves out groups of one reward, and with group_size 1 all are: change one"
            )
        return self
