"""Task ``exact_match``: the share of greedy completions in which the expected answer is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from posttrain_lib.evaluation.answers import extractor, majority_baseline, matches
from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.evaluation.tasks.prompts import Prompts, completions_of

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


class ExactMatch(Task):
    """Args as ``config.evaluation.ExactMatchTask``."""

    name = "exact_match"
    metrics = ("exact_match",)

    def __init__(
        self,
        *,
        prompts: int,
        file: str | None = None,
        fields: Mapping[str, str] | None = None,
        extract: str = "whole",
        max_new_tokens: int = 48,
    ) -> None:
        self._prompts = Prompts(prompts, file, fields or {})
        self._extract = extractor(extract, "evaluation.tasks: extract")
        self._most = max_new_tokens
        self.needs = self._prompts.needs

    def files(self) -> tuple[str, ...]:
        """The prompts' file."""
        return self._prompts.files()

    def check(self) -> None:
        """The file's rows."""
        self._prompts.check()

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """1 or 0 of each prompt; the baseline is the most frequent answer."""
        prompts = self._prompts.take(tokenizer, given)
        made = completions_of(model, tokenizer, prompts, max_new_tokens=self._most)
        texts = [tokenizer.decode(tokens) for (tokens,) in made]
        answers = [prompt["answer"] for prompt in prompts]
        hits = [matches(text, answer, self._extract) for text, answer in zip(texts, answers, strict=True)]
        answer, share = majority_baseline(answers, self._extract)
        scores = Scores(
            np.array(hits, dtype=np.float64),
            groups=tuple(prompt["source"] for prompt in prompts),
            unit="share",
            baseline=(f"always {answer!r}", share) if share > 0 else None,
        )
        examples = [
            {"row_id": prompt["row_id"], "expected": prompt["answer"], "completion": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return TaskResult({"exact_match": scores}, examples)
