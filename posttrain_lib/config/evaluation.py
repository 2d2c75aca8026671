"""The ``evaluation`` section: greedy generation on held-out prompts, and the gates of a good run."""

from __future__ import annotations

from pydantic import Field

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
