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
    """A validated row.

    ``group`` is the key by which train and held-out are split apart: ``<field>:<value>`` of the row's own field, else
    ``user:<first question>`` (``formats.common.group_is_named`` tells which). Of rows without messages it may be None:
    a group by their content.
    """

    source: str
    row_id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred.

    ``prompt`` ends with what is answered; ``chosen`` and ``rejected`` are the messages of each answer (the first is
    the assistant's). ``margin`` is how much better the first is, in the unit of whoever judged; None: not said.
    """

    source: str
    row_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    margin: float | None = None
    group: str | None = None


@dataclass(frozen=True)
class Prompt:
    """Messages to be answered by the model in training. ``answer`` is what a reward compares with.

    ``extra`` keeps the row's other fields, for the reward.
    """

    source: str
    row_id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text without roles; every token of it is learned."""

    source: str
    row_id: str
    text: str
    group: str | None = None


@dataclass(frozen=True)
class TokenRow:
    """A row that comes as token ids int32 [S] with loss weights float32 [S], aligned as in TokenizedExample."""

    source: str
    row_id: str
    token_ids: np.ndarray
    loss_weights: np.ndarray
    group: str | None = None


#: what a row format makes of a row
ParsedRow = Conversation | PreferencePair | Prompt | PlainText | TokenRow


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
