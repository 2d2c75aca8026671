"""Task ``pass_at_k``: the chance that one of k sampled completions is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.evaluation.answers import Verifier, extractor, matches
from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.pass_rate import pass_at_k
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.evaluation.tasks.prompts import Prompts, completions_of
from posttrain_lib.registry import resolve

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


class PassAtK(Task):
    """Args as ``config.evaluation.PassAtKTask``."""

    name = "pass_at_k"

    def __init__(
        self,
        *,
        prompts: int,
        k: Sequence[int] = (1,),
        samples: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        file: str | None = None,
        fields: Mapping[str, str] | None = None,
        verifier: str = "exact",
        extract: str = "whole",
        max_new_tokens: int = 48,
    ) -> None:
        if max(k) > samples:
            raise ConfigError(
                "pass@k needs at least k samples", where="evaluation.tasks: samples", got=samples, expected=max(k)
            )
        self._prompts = Prompts(prompts, file, fields or {})
        self._k, self._samples, self._most = tuple(k), samples, max_new_tokens
        self._temperature, self._top_p = temperature, top_p
        self._verify = _verifier(verifier, extract)
        self.needs = self._prompts.needs
        self.metrics = tuple(f"pass@{k}" for k in self._k)

    def files(self) -> tuple[str, ...]:
        """The prompts' file."""
        return self._prompts.files()

    def check(self) -> None:
        """The file's rows."""
        self._prompts.check()

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """The estimate of each prompt, for each k."""
        prompts = self._prompts.take(tokenizer, given)
        made = completions_of(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self._most,
            temperature=self._temperature,
            top_p=self._top_p,
            samples=self._samples,
            seed=given.seed,
        )
        texts = [[tokenizer.decode(tokens) for tokens in several] for several in made]
        verdicts = [self._judge(prompt, several) for prompt, several in zip(prompts, texts, strict=True)]
        right = [sum(each) for each in verdicts]
        groups = tuple(prompt["source"] for prompt in prompts)
        scores = {
            f"pass@{k}": Scores(
                np.array([pass_at_k(self._samples, count, k) for count in right]), groups=groups, unit="share"
            )
            for k in self._k
        }
        examples = [
            {
                "row_id": prompt["row_id"],
                "right": count,
                "samples": self._samples,
                "completions": several,
                "verdicts": judged,
            }
            for prompt, count, several, judged in zip(prompts, right, texts, verdicts, strict=True)
        ]
        return TaskResult(scores, examples)

    def _judge(self, prompt: Mapping[str, Any], completions: Sequence[str]) -> list[bool]:
        verdicts = [self._verify(completion, prompt) for completion in completions]
        if bad := [verdict for verdict in verdicts if verdict not in (0, 1)]:
            raise DataError(
                "a verifier of pass@k must say right or wrong",
                where=f"evaluation.tasks: verifier, row {prompt['row_id']}",
                got=repr(bad[0]),
                expected="True or False",
            )
        return [bool(verdict) for verdict in verdicts]


def _verifier(name: str, extract: str) -> Verifier:
    """``exact``: the answer that ``extract`` finds is the row's; or a user's ``module:attribute``."""
    if name != "exact":
        found: Verifier = resolve(name, {"exact": __name__}, what="verifier", where="evaluation.tasks: verifier")
        return found
    find = extractor(extract, "evaluation.tasks: extract")
    return lambda completion, row: matches(completion, row["answer"], find)
