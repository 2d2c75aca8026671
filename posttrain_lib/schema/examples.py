"""Validated rows and their tokenised form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    ``train`` and ``weight`` decide whether an assistant turn is learned: ``train=False`` means weight 0,
    ``weight`` scales the loss of each of its tokens, neither means weight 1.
    ``extra`` keeps every other key of the row's message for the chat template (``name``, ``tool_call_id``, ...).
    """

    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    train: bool | None = None
    weight: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_weight(self) -> float:
        """Loss weight of this turn's tokens if it is an assistant turn; 0.0 for any other role."""
        if self.role != "assistant" or self.train is False:
            return 0.0
        return 1.0 if self.weight is None else float(self.weight)


@dataclass(frozen=True)
class Conversation:
    """A validated row. ``group`` is the key by which train and held-out are split apart."""

    source: str
    row_id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None


@dataclass(frozen=True)
class TokenizedExample:
    """One document as token ids.

    Shapes: ``token_ids`` int32 [S]; ``loss_weights`` float32 [S], aligned with the token that is *predicted*:
    ``loss_weights[i]`` weighs the loss of predicting ``token_ids[i]`` from what stands before it. 0 = not trained.
    """

    token_ids: np.ndarray
    loss_weights: np.ndarray
    source: str
    row_id: str
