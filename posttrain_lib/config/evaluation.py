"""The ``evaluation`` section: greedy generation on held-out prompts, and the gates of a good run."""

from __future__ import annotations

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section


class Gates(Section):
    """What the flow's last step demands. None = not demanded."""

    max_held_out_loss_ratio: float | None = Field(None, gt=0, description="held-out loss after / before")
    min_exact_match: float | None = Field(None, ge=0, le=1)
    min_exact_match_over_majority: float | None = Field(
        None, ge=0, le=1, description="exact match minus the majority-answer baseline"
    )


class EvaluationConfig(Section):
    """Evaluation after training."""

    exact_match_prompts: int = Field(
        0, ge=0, le=2000, description="held-out conversations whose last answer must match"
    )
    samples: int = Field(6, ge=0, description="before/after generations shown in the report")
    max_new_tokens: int = Field(48, ge=1)
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _gates_are_measured(self) -> EvaluationConfig:
        wanted = (self.gates.min_exact_match, self.gates.min_exact_match_over_majority)
        if any(gate is not None for gate in wanted) and self.exact_match_prompts == 0:
            raise ValueError("gates on exact match need exact_match_prompts above 0")
        return self
