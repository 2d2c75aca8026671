"""Reward ``model``: the score of a reward model, as ``RewardFlow`` exports one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats.common import message_of
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.scoring import check_reward_folder, score_documents
from posttrain_lib.schema.examples import Message
from posttrain_lib.schema.rollouts import Answer
from posttrain_lib.training.device import pick_device


class RewardModel:
    """Scores the conversation of prompt and answer, in the reward model's own chat template and tokens.

    As its README.md says: at the answer's end-of-turn marker, with the white space cut that the template writes behind
    it. A completion that did not come to its end is scored as if it had. On a GPU the reward's ``memory_gib`` should be
    None: CUDA reserves address space as it goes.

    Args:
        folder: of the reward model, with its tokenizer and chat template.
        device: cpu, cuda, or auto.
        row_tokens: tokens of one forward, which bounds memory.

    Raises:
        ConfigError, ModelError, DataError: no folder, not a reward model's, no tokenizer or template.
    """

    reads = ("folder",)

    def __init__(self, folder: str, device: str = "cpu", row_tokens: int = 4096) -> None:
        self._padding = check_reward_folder(folder, "rewards: folder")
        self._tokenizer = ChatTokenizer(folder, engine="hf")
        self._model = load_model(folder).to(pick_device(device, 0))
        self._row_tokens = row_tokens

    def __call__(self, answer: Answer) -> float:
        """The score; unbounded, higher is better."""
        return self.grade_many([answer])[0]

    def grade_many(self, answers: Sequence[Answer]) -> list[float]:
        """The score of each.

        Raises:
            RefusedRow: the template refuses a conversation.
        """
        documents = [self._tokens(answer) for answer in answers]
        scores = score_documents(self._model, documents, self._row_tokens, pad_token_id=self._padding)
        return [float(score) for score in scores]

    def _tokens(self, answer: Answer) -> np.ndarray:
        asked = [message_of(dict(message), number) for number, message in enumerate(answer.prompt)]
        text = self._tokenizer.render([*asked, Message("assistant", answer.text)]).rstrip()
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.int64)
