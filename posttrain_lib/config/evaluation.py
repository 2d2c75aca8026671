"""The ``evaluation`` section: held-out loss, generations, tasks, and the gates of a good run."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from posttrain_lib.config.base import Disagreement, Problem, Section
from posttrain_lib.config.origin import ModelOrigin


class MetricGate(Section):
    """Bounds of one metric after training, and of its change by training (after minus before)."""

    min: float | None = None
    max: float | None = None
    min_change: float | None = None
    max_change: float | None = None

    @model_validator(mode="after")
    def _demands_something(self) -> MetricGate:
        if all(bound is None for bound in (self.min, self.max, self.min_change, self.max_change)):
            raise ValueError("a gate demands something: give min, max, min_change or max_change")
        return self


class Gates(Section):
    """What the flow's last step demands. None = not demanded."""

    max_held_out_loss_ratio: float | None = Field(None, gt=0, description="held-out loss after / before")
    min_exact_match: float | None = Field(None, ge=0, le=1)
    min_exact_match_over_majority: float | None = Field(
        None, ge=0, le=1, description="exact match minus the majority-answer baseline"
    )
    metrics: dict[str, MetricGate] = Field(
        {}, description="gates on metrics of evaluation.tasks, as 'multiple_choice.accuracy': {min: 0.5}"
    )


class TaskSection(Section):
    """What every task has. ``name``: what it is called in results and gates; default: its task."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    task: str

    @property
    def title(self) -> str:
        """The task's name in results; without a dot, behind which gates have the metric."""
        return self.name or self.task.rpartition(":")[2].rpartition(".")[2]

    def arguments(self) -> dict[str, Any]:
        """What the task is made with."""
        return self.model_dump(mode="json", exclude={"task", "name"}, exclude_none=True)


class PerplexityTask(TaskSection):
    """Of the trained tokens of the held-out documents, overall and per source."""

    task: Literal["perplexity"]


class PromptFields(Section):
    """What the fields of a prompt's row are called, where not by these names."""

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None
    tools: str | None = None


class ChoiceFields(Section):
    """What the fields of a question's row are called, where not by these names."""

    prompt: str | None = None
    choices: str | None = None
    answer: str | None = None


class PromptedTask(TaskSection):
    """A task that generates. Prompts are the run's held-out ones, or rows of ``file``: ``prompt`` (a text or messages)
    and ``answer``; ``fields`` says what they are called there, as {prompt: question}."""

    file: str | None = None
    fields: PromptFields = PromptFields()
    prompts: int = Field(100, ge=1, description="the first ones are used")
    max_new_tokens: int = Field(48, ge=1)


class ExactMatchTask(PromptedTask):
    """``extract`` finds the answer in both texts: whole, gsm8k (the number behind ####), last_number, or
    module:attribute."""

    task: Literal["exact_match"]
    extract: str = "whole"


class MultipleChoiceTask(TaskSection):
    """Rows of ``file``: ``prompt``, ``choices`` (texts) and ``answer`` (an index from 0)."""

    task: Literal["multiple_choice"]
    file: str
    fields: ChoiceFields = ChoiceFields()
    limit: int | None = Field(None, ge=1, description="the first ones are used")
    chat: bool = Field(False, description="the prompt goes through the chat template, as a user's turn or messages")
    before_choice: str = Field(" ", description="between prompt and choice; not with chat")

    @model_validator(mode="after")
    def _chat_has_its_own(self) -> MultipleChoiceTask:
        if self.chat and self.before_choice != type(self).model_fields["before_choice"].default:
            raise ValueError("before_choice is not for chat: true, where the template stands between prompt and choice")
        return self


class SampledTask(PromptedTask):
    """A task that may sample."""

    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _greedy_has_no_nucleus(self) -> SampledTask:
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError("top_p is of sampling: set temperature above 0, or leave top_p out")
        return self


class Judge(Section):
    """A reward model that scores what another model answers."""

    path: str = Field(
        description="a sequence classification folder of one label and of the trained model's tokenizer, or a name, as "
        "RewardFlow/latest or models/judge"
    )
    origin: ModelOrigin | None = Field(None, description="written by the run: what made the model that path named")


class WinRateTask(SampledTask):
    """What judges prompt and completion is a ``reward_model``, or a ``scorer``: module:attribute, called with a list of
    arrays of token ids (and with ``scorer_options``), gives a score for each."""

    task: Literal["win_rate"]
    reward_model: Judge | None = None
    scorer: str | None = None
    scorer_options: dict[str, Any] = Field({}, description="further arguments of the scorer")

    def arguments(self) -> dict[str, Any]:
        """The reward model by its folder."""
        judge = {} if self.reward_model is None else {"reward_model": self.reward_model.path}
        return {**super().arguments(), **judge}

    @model_validator(mode="after")
    def _one_judge(self) -> WinRateTask:
        if (self.reward_model is None) == (self.scorer is None):
            raise ValueError("win_rate needs one judge: give reward_model, or scorer")
        if self.scorer_options and self.scorer is None:
            raise ValueError("scorer_options are a scorer's: leave them out with reward_model")
        return self


class PassAtKTask(SampledTask):
    """``verifier``: exact (the answer that ``extract`` finds), or module:attribute, called with the completion and the
    prompt's row."""

    task: Literal["pass_at_k"]
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    samples: int = Field(8, ge=1, description="completions of each prompt")
    temperature: float = Field(1.0, gt=0)
    verifier: str = "exact"
    extract: str = "whole"

    @model_validator(mode="after")
    def _enough_samples(self) -> PassAtKTask:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs at least {max(self.k)} samples, got {self.samples}")
        if self.verifier != "exact" and self.extract != "whole":
            raise ValueError("extract is for verifier exact: a verifier of one's own finds the answer itself")
        return self


class UserTask(TaskSection):
    """A task of the user's own: module:attribute, made with ``options``."""

    task: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    options: dict[str, Any] = Field({}, description="arguments by name")

    def arguments(self) -> dict[str, Any]:
        """The options, as given."""
        return dict(self.options)


TASK_NAMES = ("perplexity", "exact_match", "multiple_choice", "win_rate", "pass_at_k")


def _kind(value: Any) -> str:
    task = value.get("task") if isinstance(value, dict) else getattr(value, "task", None)
    return "user" if isinstance(task, str) and ":" in task else str(task)


AnyTask = Annotated[
    Annotated[PerplexityTask, Tag("perplexity")]
    | Annotated[ExactMatchTask, Tag("exact_match")]
    | Annotated[MultipleChoiceTask, Tag("multiple_choice")]
    | Annotated[WinRateTask, Tag("win_rate")]
    | Annotated[PassAtKTask, Tag("pass_at_k")]
    | Annotated[UserTask, Tag("user")],
    Discriminator(_kind),
]


class LmEval(Section):
    """lm-evaluation-harness on the exported folder, in a process of its own. It must be installed."""

    tasks: tuple[str, ...] = Field(min_length=1, description="as lm_eval's --tasks")
    include_path: str | None = Field(None, description="folder with task files of your own")
    limit: int | None = Field(None, ge=1, description="examples of each task")
    num_fewshot: int | None = Field(None, ge=0)
    batch_size: int = Field(8, ge=1)
    device: str = "cpu"
    apply_chat_template: bool = False
    timeout_minutes: float = Field(240.0, gt=0)


class EvaluationConfig(Section):
    """Evaluation after training."""

    exact_match_prompts: int = Field(
        0, ge=0, le=2000, description="held-out conversations whose last answer must match"
    )
    samples: int = Field(6, ge=0, description="before/after generations shown in the report")
    max_new_tokens: int = Field(48, ge=1)
    tasks: tuple[AnyTask, ...] = ()
    seed: int = Field(0, ge=0, description="of sampled completions and of the intervals' resampling")
    lm_eval: LmEval | None = None
    gates: Gates = Gates()

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_exist(cls, tasks: Any) -> Any:
        named = [one.get("task") for one in tasks if isinstance(one, dict)] if isinstance(tasks, list | tuple) else []
        for task in named:
            if not isinstance(task, str) or (":" not in task and task not in TASK_NAMES):
                near = difflib.get_close_matches(str(task), TASK_NAMES, n=1)
                what = f"unknown task {task!r}: expected one of {', '.join(TASK_NAMES)}; or module:attribute"
                raise Disagreement([Problem(what, f"did you mean '{near[0]}'?" if near else "name one of these")])
        return tasks

    @model_validator(mode="after")
    def _gates_are_measured(self) -> EvaluationConfig:
        wanted = (self.gates.min_exact_match, self.gates.min_exact_match_over_majority)
        if any(gate is not None for gate in wanted) and self.exact_match_prompts == 0:
            raise ValueError("gates on exact match need exact_match_prompts above 0")
        titles = Counter(task.title for task in self.tasks)
        if twice := [title for title, count in titles.items() if count > 1]:
            raise ValueError(f"several tasks are called {twice[0]!r}: give each a name of its own")
        if "held_out" in titles:
            raise ValueError("the name 'held_out' is the held-out loss's own: give the task another")
        for gate in self.gates.metrics:
            title = gate.partition(".")[0]
            if title not in {*titles, "held_out"}:
                known = ", ".join(f"{name}.<metric>" for name in [*titles, "held_out"])
                near = difflib.get_close_matches(title, [*titles, "held_out"], n=1)
                fix = f"did you mean '{near[0]}'?" if near else "name a task of evaluation.tasks"
                raise Disagreement([Problem(f"gates.metrics names {gate!r}, expected one of {known}", fix)])
        return self
