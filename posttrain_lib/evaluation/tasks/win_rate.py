"""Task ``win_rate``: how often a scorer prefers what the model answers after training to what it answered before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.scoring import check_reward_folder, score_documents
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.evaluation.tasks.prompts import Prompts, completions_of
from posttrain_lib.registry import resolve

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder

#: name -> a Scorer; a run file may name another one as module:attribute
SCORERS: dict[str, str] = {}


class Scorer(Protocol):
    """Judges documents: prompt and completion, the stop token included, as int64 arrays of token ids."""

    def __call__(self, documents: list[NDArray[np.int64]]) -> Sequence[float] | NDArray[Any]:
        """A score for each, float [n], higher is better, and the same for the same document at any time."""
        ...


class WinRate(Task):
    """Args as ``config.evaluation.WinRateTask``."""

    name = "win_rate"
    metrics = ("score", "win_rate")

    def __init__(
        self,
        *,
        prompts: int,
        scorer: str | None = None,
        reward_model: str | None = None,
        scorer_options: Mapping[str, Any] | None = None,
        file: str | None = None,
        fields: Mapping[str, str] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 48,
    ) -> None:
        self._prompts = Prompts(prompts, file, fields or {})
        if (scorer is None) == (reward_model is None):
            raise ConfigError("win_rate needs one judge", where="evaluation.tasks", expected="reward_model, or scorer")
        self._scorer_name, self._scorer_options, self._folder = scorer, dict(scorer_options or {}), reward_model
        self._temperature, self._top_p, self._most = temperature, top_p, max_new_tokens
        self._known: dict[bytes, float] = {}
        self.needs = self._prompts.needs

    def files(self) -> tuple[str, ...]:
        """The prompts' file."""
        return self._prompts.files()

    def models(self) -> tuple[str, ...]:
        """The reward model's folder."""
        return () if self._folder is None else (self._folder,)

    def check(self) -> None:
        """The file's rows, and that the scorer can be imported, or the folder is a reward model's."""
        self._prompts.check()
        if self._folder is None:
            self._scorer(0)
        else:
            check_reward_folder(self._folder, "evaluation.tasks: reward_model")

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """The score of each prompt's completion."""
        prompts = self._prompts.take(tokenizer, given)
        made = completions_of(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self._most,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=given.seed,
        )
        documents = [
            np.array([*prompt["prompt_ids"], *tokens], dtype=np.int64)
            for prompt, (tokens,) in zip(prompts, made, strict=True)
        ]
        values = self._scored(documents, given.row_tokens)
        groups = tuple(prompt["source"] for prompt in prompts)
        examples = [
            {"row_id": prompt["row_id"], "completion": tokenizer.decode(tokens), "score": float(value)}
            for prompt, (tokens,), value in zip(prompts, made, values, strict=True)
        ]
        return TaskResult({"score": Scores(values, groups=groups)}, examples)

    def _scored(self, documents: list[NDArray[np.int64]], row_tokens: int) -> NDArray[np.float64]:
        """The score of each document, float64 [n]. One that was scored before keeps its score: what a reward model is
        given beside it moves the last bits, and equal answers of two models would not be a tie."""
        new = {each.tobytes(): each for each in documents if each.tobytes() not in self._known}
        values = np.asarray(self._scorer(row_tokens)([*new.values()]) if new else [], dtype=np.float64)
        if values.shape != (len(new),) or not np.isfinite(values).all():
            raise DataError(
                "the scorer gave no finite score for each document",
                where=f"evaluation.tasks: {self._scorer_name or self._folder}",
                got=f"shape {values.shape}, {int((~np.isfinite(values)).sum())} not finite",
                expected=f"{len(new)} finite numbers",
            )
        self._known.update(zip(new, values.tolist(), strict=True))
        return np.array([self._known[each.tobytes()] for each in documents])

    def compare(self, before: TaskResult, after: TaskResult) -> dict[str, Scores]:
        """1 where the score rose, 0 where it fell, one half where it stayed, as for equal answers."""
        earlier, later = before.scores["score"], after.scores["score"]
        wins = (np.sign(later.values - earlier.values) + 1) / 2
        return {"win_rate": Scores(wins, groups=later.groups, unit="share", baseline=("no preference", 0.5))}

    def _scorer(self, row_tokens: int) -> Scorer:
        if self._scorer_name is None:
            model, padding = self._judge
            return partial(score_documents, model, row_tokens=row_tokens, pad_token_id=padding)
        found: Scorer = resolve(self._scorer_name, SCORERS, what="scorer", where="evaluation.tasks: scorer")
        return partial(found, **self._scorer_options) if self._scorer_options else found

    @cached_property
    def _judge(self) -> tuple[Decoder, int | None]:
        """The reward model and its padding token, loaded once for the models before and after."""
        assert self._folder is not None
        padding = check_reward_folder(self._folder, "evaluation.tasks: reward_model")
        return load_model(self._folder), padding
