"""What a job of rollouts is told besides its TrainJob: plain values, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain_lib.rl.constrain import ConstraintSpec
    from posttrain_lib.rl.environments.base import EnvironmentSpec
    from posttrain_lib.rl.rewards.base import RewardSpec
    from posttrain_lib.rl.settings import RLSettings


@dataclass(frozen=True)
class RolloutJob:
    """Where prompts come from, who answers and who grades.

    ``prompts`` and ``held_out`` are files of step ``prepare_data``. ``tokenizer`` is a folder, ``chat_template`` a file
    that replaces its template, or None; ``template_date`` and ``template_kwargs`` are what prompts were rendered with.
    ``engine`` is a name in ``rl.run.ENGINES`` or module:attribute, made with
    ``engine_options``. ``reference`` and ``teacher``: folders of frozen models, which the loss compares with and the
    policy learns from. ``longest_prompt``: tokens of the longest prompt that is asked. ``environment``: what answers
    the policy; None: nothing, an answer is one completion. ``constraint``: what may be sampled; None: anything.
    ``trajectory``: what of the run file decides the weights besides the train section. For the bounds see
    ``config.grpo.Rollout``.
    """

    prompts: str
    held_out: str
    tokenizer: str
    settings: RLSettings
    rewards: tuple[RewardSpec, ...]
    longest_prompt: int
    template_date: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "embedded"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    teacher: str | None = None
    environment: EnvironmentSpec | None = None
    constraint: ConstraintSpec | None = None
    grader_processes: int = 1
    max_mismatch: float | None = None
    max_canary_difference: float | None = None
    trajectory: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> str | None:
        """Folder of the frozen model, whatever it is for: there is one at most."""
        return self.reference if self.teacher is None else self.teacher
