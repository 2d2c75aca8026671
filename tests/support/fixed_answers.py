"""An evaluation task of a user's own: how likely the right answers of a file are, which small models move too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.generation import token_logprobs
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.evaluation.tasks.rows import prompt_reader, text_ids, with_ids

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


class FixedAnswers(Task):
    """Mean log-probability of the tokens of each right answer behind its prompt."""

    name = "fixed_answers"
    needs = frozenset()
    metrics = ("logprob",)

    def __init__(self, *, file: str, limit: int) -> None:
        self._file, self._limit = file, limit

    def files(self) -> tuple[str, ...]:
        """The questions."""
        return (self._file,)

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """One score for each question."""
        rows = [json.loads(line) for line in Path(self._file).read_text().splitlines()[: self._limit]]
        read = prompt_reader({})
        asked = [read(str(i), {"prompt": row["prompt"], "answer": row["answer"]}) for i, row in enumerate(rows)]
        prompts = [row["prompt_ids"] for row in with_ids(self._file, asked, tokenizer)]
        answers = [text_ids(tokenizer, row["choices"][row["answer"]]) for row in rows]
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        begins = [len(prompt) for prompt in prompts]
        values = [float(np.mean(each)) for each in token_logprobs(model, sequences, begins)]
        return TaskResult({"logprob": Scores(np.array(values), unit="nats")})
