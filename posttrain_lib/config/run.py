"""A whole run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Disagreement, Problem, Section
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.evaluation import EvaluationConfig
from posttrain_lib.config.export import ExportConfig
from posttrain_lib.config.grpo import GRPO, FrozenPolicy
from posttrain_lib.config.model import ModelConfig
from posttrain_lib.config.objectives import DPO, Distill, Objective, Reference, Reward, Teacher
from posttrain_lib.config.tracking import Tracker
from posttrain_lib.config.train import TrainConfig


def _check_on_the_fly(data: DataConfig, train: TrainConfig) -> None:
    """What needs to know the whole data set cannot be had while it is read.

    Raises:
        ValueError: naming the field.
    """
    problem = None
    mixture = train.mixture
    if train.shuffle_window is None:
        problem = "reads rows in sequence: give train.shuffle_window, as 10000"
    elif train.steps is None:
        problem = "does not know how many steps the data makes: give train.steps"
    elif data.deduplicate:
        problem = "cannot know all earlier examples: turn data.deduplicate off"
    elif mixture is not None:
        shares = [mixture.sources.get(source.name) for source in data.sources]
        if any(share is None or share.weight is None for share in shares):
            problem = "does not know the sizes of the sources: give each a weight in train.mixture.sources"
        elif any(share is not None and share.max_examples is not None for share in shares):
            problem = "cannot choose among all examples of a source: leave train.mixture.sources.*.max_examples out"
        elif any(share is not None and share.epochs is not None and share.epochs % 1 for share in shares):
            problem = "can count whole passes only: give whole train.mixture.sources.*.epochs"
    if problem is not None:
        raise ValueError(f"data.on_the_fly {problem}")


def _check_batch(train: TrainConfig, compute: ComputeConfig, *, by_rows: bool) -> list[Problem]:
    """Rows of a step, where a step is a number of them, against the devices that see different ones, and tokens of a
    row against those that share it."""
    problems = []
    groups, rows, each = compute.mesh_spec().data_degree, train.rows_per_step, train.micro_batch_rows
    if by_rows and rows % (groups * each):
        fixes = []
        if rows % groups == 0:
            most = max(part for part in range(1, each) if rows // groups % part == 0)
            fixes.append(f"set train.micro_batch_rows: {most}")
        whole = rows // (groups * each) * groups * each
        near = [str(count) for count in (whole, whole + groups * each) if count]
        fixes.append(f"set train.rows_per_step: {' or '.join(near)}")
        what = (
            f"train.rows_per_step ({rows}) is not a multiple of the mesh's replicate x shard times "
            f"train.micro_batch_rows ({groups} x {each} = {groups * each})"
        )
        problems.append(Problem(what, ", or ".join(fixes)))
    parts = 2 * compute.mesh.context
    if parts > 2 and train.row_tokens % parts:
        what = (
            f"train.row_tokens ({train.row_tokens}) is not a multiple of 2 x compute.mesh.context ({parts}): "
            "each of those devices gets two equal chunks of a row"
        )
        problems.append(Problem(what, f"set train.row_tokens: {-(-train.row_tokens // parts) * parts}"))
    return problems


class RunConfig(Section):
    """Everything a run depends on. The resolved form is stored with every run."""

    recipe: Literal["sft", "dpo", "reward", "distill", "grpo"] = "sft"
    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="short name of the run, for tags and reports"
    )
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    dpo: DPO | None = Field(None, description="of recipe dpo")
    reward: Reward | None = Field(None, description="of recipe reward")
    distill: Distill | None = Field(None, description="of recipe distill")
    grpo: GRPO | None = Field(None, description="of recipe grpo")
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    tracking: tuple[Tracker, ...] = Field((), description="where figures go besides the run's own metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _section_of_the_recipe(cls, raw: Any) -> Any:
        """A recipe's section is there, with its defaults where it is not written."""
        recipe = raw.get("recipe", "sft") if isinstance(raw, dict) else "sft"
        if recipe in ("dpo", "reward") and raw.get(recipe) is None:
            return {**raw, recipe: {}}
        return raw

    @model_validator(mode="after")
    def _loss_of_the_recipe(self) -> RunConfig:
        """The recipe's section says which loss it is; ``train.loss`` may name a loss of one's own in its place."""
        sections = self._sections()
        if foreign := [name for name, found in sections.items() if found is not None and name != self.recipe]:
            raise ValueError(f"section {foreign[0]} is for recipe {foreign[0]}, and this one is {self.recipe}")
        if self.recipe == "sft":
            return self
        section = sections[self.recipe]
        if section is None:
            raise ValueError(f"recipe {self.recipe} needs a section {self.recipe}")
        name, options = section.loss()
        given = self.train.loss_options
        if self.train.loss is None and given:
            raise ValueError(
                f"train.loss_options {given} are of train.loss, and recipe {self.recipe} says its loss in section "
                f"{self.recipe}: give them there"
            )
        if self.train.loss == name and given != options:
            raise ValueError(
                f"train.loss {name!r} with options {given} contradicts section {self.recipe}, which says {options}: "
                f"leave train.loss and train.loss_options out, and say it in {self.recipe} alone"
            )
        if self.train.loss not in (name, None) and (unread := section.changed_loss_fields()):
            raise ValueError(
                f"{self.recipe}.{unread[0]} is an option of the loss {name!r}, and train.loss names "
                f"{self.train.loss!r}: give its options in train.loss_options, and leave {self.recipe}.{unread[0]} out"
            )
        return self

    def _sections(self) -> dict[str, Objective | None]:
        """What recipes have as their own, by recipe."""
        return {"dpo": self.dpo, "reward": self.reward, "distill": self.distill, "grpo": self.grpo}

    @property
    def section(self) -> Objective | None:
        """The recipe's own; SFT has none."""
        return self._sections().get(self.recipe)

    @property
    def trained(self) -> TrainConfig:
        """The train section with the loss that is trained: the recipe's section says it where ``train.loss`` names none
        of one's own. Whoever wants the loss asks here: ``train`` itself has what the run file says, no more."""
        if self.train.loss is not None:
            return self.train
        name, options = ("sft", self.train.loss_options) if self.section is None else self.section.loss()
        return self.train.model_copy(update={"loss": name, "loss_options": options})

    @property
    def has_kl(self) -> bool:
        """Whether the loss of rollouts holds the policy near to a frozen model: its options have a ``kl_weight`` above
        0, the section's or, of a loss of one's own, ``train.loss_options``."""
        weight = self.trained.loss_options.get("kl_weight", 0)
        return self.grpo is not None and isinstance(weight, int | float) and weight > 0

    @property
    def companion(self) -> Reference | Teacher | FrozenPolicy | None:
        """The frozen model that the recipe compares with; None where there is none."""
        if self.dpo is not None and self.dpo.needs_reference:
            return self.dpo.reference
        if self.grpo is not None and self.has_kl:
            return self.grpo.reference
        if self.grpo is not None and self.grpo.teacher is not None:
            return self.grpo.teacher
        return None if self.distill is None else self.distill.teacher

    @model_validator(mode="after")
    def _beside_can(self) -> RunConfig:
        kept = None if self.companion is None else self.companion.kept
        if kept == "base" and (self.model.lora is None or self.model.lora.dora):
            raise ValueError(
                "dpo.reference.kept: base is the policy without its adapters, and needs model.lora without dora; "
                "set dpo.reference.kept: precomputed or live"
            )
        if kept in ("precomputed", "stored") and self.data.on_the_fly:
            raise ValueError("what is stored of every example needs prepared data: set data.on_the_fly: false, or live")
        if self.recipe == "reward" and self.model.backend == "hf":
            raise ValueError("recipe reward needs a definition of ours: set model.backend: native")
        if self.recipe == "reward":
            self._reward_model_writes_nothing()
        if self.compute.mesh.context > 1 and not (self.recipe == "sft" or (self.distill and kept == "live")):
            raise ValueError(
                f"recipe {self.recipe} needs whole documents: set compute.mesh.context: 1"
                + (", or distill.teacher.kept: live" if self.distill else "")
            )
        return self

    @model_validator(mode="after")
    def _rollouts_can(self) -> RunConfig:
        if self.grpo is None:
            return self
        train, data, rollout = self.train, self.data, self.grpo.rollout
        if self.grpo.teacher is not None and self.has_kl:
            raise ValueError("a teacher and a reference (kl_weight) are two frozen models: leave one of them out")
        if self.grpo.reference != FrozenPolicy() and not self.has_kl:
            raise ValueError(
                "grpo.reference is compared with where kl_weight is above 0 (grpo.kl_weight; of a loss of one's own "
                "train.loss_options.kl_weight): set that, or leave grpo.reference out"
            )
        if train.steps is None:
            raise ValueError("recipe grpo needs train.steps, which counts updates: its data has no end")
        fields = type(train).model_fields
        for name in ("rows_per_step", "packing_buffer", "shuffle_window", "mixture", "early_stopping"):
            if getattr(train, name) != fields[name].default:
                raise ValueError(f"train.{name} is not for recipe grpo, whose rows are made of what was sampled")
        instead = {
            "train.evaluate_every_steps": (train, "grpo.held_out.every_steps"),
            "evaluation.exact_match_prompts": (self.evaluation, "grpo.rewards, or a task exact_match"),
            "evaluation.max_new_tokens": (self.evaluation, "grpo.rollout.max_new_tokens"),
        }
        for field, (section, use) in instead.items():
            name = field.rpartition(".")[2]
            if getattr(section, name) != type(section).model_fields[name].default:
                raise ValueError(f"{field} is not for recipe grpo, which has {use}: leave it out")
        if other := [source.name for source in data.sources if source.format != "prompts"]:
            raise ValueError(f"recipe grpo asks prompts: give data.sources {other[0]!r} format: prompts")
        if data.on_the_fly:
            raise ValueError("recipe grpo reads prepared prompts: set data.on_the_fly: false")
        episode = None if self.grpo.environment is None else self.grpo.environment.max_tokens
        if episode is not None and not rollout.max_new_tokens < episode <= train.row_tokens:
            raise ValueError(
                f"grpo.environment.max_tokens ({episode}) must be more than grpo.rollout.max_new_tokens "
                f"({rollout.max_new_tokens}), and at most train.row_tokens ({train.row_tokens})"
            )
        if data.max_example_tokens + rollout.max_new_tokens > train.row_tokens:
            raise ValueError(
                f"a prompt of data.max_example_tokens ({data.max_example_tokens}) and an answer of "
                f"grpo.rollout.max_new_tokens ({rollout.max_new_tokens}) do not fit into train.row_tokens "
                f"({train.row_tokens}): raise the last, or lower one of the others"
            )
        if self.compute.launcher == "torchrun":
            raise ValueError("recipe grpo is driven from one process: leave compute.launcher out, or set ray")
        if self.compute.address is not None and self.compute.address.startswith("ray://"):
            raise ValueError(
                "recipe grpo's worker groups (verl) ask Ray where nodes are, which a client cannot: name the head as "
                "compute.address host:port from a machine of the cluster"
            )
        if self.compute.min_devices is not None:
            raise ValueError("recipe grpo waits for all its devices after a loss: leave compute.min_devices out")
        if self.model.backend == "hf":
            raise ValueError("recipe grpo needs a definition of ours: set model.backend: native")
        return self

    def _reward_model_writes_nothing(self) -> None:
        if self.evaluation.exact_match_prompts:
            raise ValueError("a reward model writes nothing: leave evaluation.exact_match_prompts out")
        if built_in := [task.task for task in self.evaluation.tasks if ":" not in task.task]:
            raise ValueError(
                f"a reward model has no next token: leave the task {built_in[0]} out of evaluation.tasks; its accuracy "
                "and calibration on held-out pairs are always measured"
            )

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        train, data = self.train, self.data
        if data.max_example_tokens > train.row_tokens:
            raise ValueError(
                f"data.max_example_tokens ({data.max_example_tokens}) exceeds train.row_tokens ({train.row_tokens}): "
                "an example could not fit in a packed row; lower the first or raise the second"
            )
        if problems := _check_batch(train, self.compute, by_rows=self.grpo is None):
            raise Disagreement(problems)
        if self.model.backend == "hf" and train.compile != "none":
            raise ValueError("train.compile is for decoders of our own definition, not for model.backend 'hf'")
        names = {source.name for source in data.sources}
        mixed = train.mixture.sources if train.mixture is not None else {}
        if unknown := sorted(set(mixed) - names):
            raise ValueError(f"train.mixture.sources names {unknown}, which data.sources ({sorted(names)}) does not")
        weighed = {name for name, source in mixed.items() if source.weight is not None}
        if weighed and weighed != names:
            raise ValueError(
                f"train.mixture.sources gives a weight to {sorted(weighed)} and none to {sorted(names - weighed)}: "
                "weigh every source or none (then sizes decide, and train.mixture.temperature)"
            )
        if train.mixture is not None and train.steps is None and train.mixture.never_ends(names):
            raise ValueError("the mixture repeats its sources without end: give train.steps, or another 'exhausted'")
        if data.on_the_fly:
            _check_on_the_fly(data, train)
        if self.data.tokenizer is not None and self.model.vocabulary.new_tokens():
            raise ValueError(
                "model.vocabulary adds tokens to the model's own tokenizer, and data.tokenizer names another one; "
                "leave data.tokenizer out, or add the tokens to its files and to the model yourself"
            )
        if self.data.tokenizer is not None and self.model.from_scratch is not None:
            raise ValueError(
                "data.tokenizer and model.from_scratch both name a tokenizer; "
                "give it as model.from_scratch.tokenizer alone"
            )
        return self
