"""Task ``multiple_choice``: the choice to which the model gives the highest probability behind the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.refusal import RefusedRow, kind_of
from posttrain_lib.evaluation.bootstrap import Scores
from posttrain_lib.evaluation.generation import token_logprobs
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.evaluation.tasks.rows import each_of, prompt_reader, read_rows, text_ids, with_ids

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder

FIELDS = ("prompt", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """A row: ``answer`` is the index of the right one of ``choices``."""

    row_id: str
    prompt: Any
    choices: tuple[str, ...]
    answer: int


class MultipleChoice(Task):
    """Args as ``config.evaluation.MultipleChoiceTask``."""

    name = "multiple_choice"
    needs = frozenset()
    metrics = ("accuracy", "accuracy_norm", "answer_probability")

    def __init__(
        self,
        *,
        file: str,
        fields: Mapping[str, str] | None = None,
        limit: int | None = None,
        chat: bool = False,
        before_choice: str = " ",
    ) -> None:
        self._file, self._limit, self._chat = file, limit, chat
        self._fields = {name: (fields or {}).get(name, name) for name in FIELDS}
        self._before = "" if chat else before_choice

    def files(self) -> tuple[str, ...]:
        """The questions."""
        return (self._file,)

    def check(self) -> None:
        """The file's rows."""
        self._questions()

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """``accuracy``: by the sum of a choice's log-probs. ``accuracy_norm``: by that sum over the choice's length in
        characters, as lm-evaluation-harness's acc_norm. ``answer_probability``: that of the right choice among the
        choices, by the sums; it moves where no accuracy does yet. Ties go to the first."""
        questions = self._questions()
        prompts = self._prompt_ids(questions, tokenizer)
        choices = each_of(
            self._file,
            questions,
            lambda asked: [_ids_of(tokenizer, "choice", self._before + choice) for choice in asked.choices],
            lambda asked: asked.row_id,
        )
        sequences = [[*prompt, *ids] for prompt, several in zip(prompts, choices, strict=True) for ids in several]
        begins = [len(prompt) for prompt, several in zip(prompts, choices, strict=True) for _ in several]
        sums = iter([sum(values) for values in token_logprobs(model, sequences, begins)])
        rows = [_judged(asked, [next(sums) for _ in asked.choices]) for asked in questions]
        chance = ("chance", float(np.mean([1 / len(asked.choices) for asked in questions])))
        scores = {
            name: Scores(np.array([row[name] for row in rows], float), unit="share", baseline=chance)
            for name in self.metrics
        }
        return TaskResult(scores, rows)

    def _questions(self) -> list[Question]:
        return read_rows(self._file, self._read, self._limit)

    def _read(self, row_id: str, row: Mapping[str, Any]) -> Question:
        if missing := [name for name in self._fields.values() if row.get(name) is None]:
            raise RefusedRow("missing_field", f"no {', '.join(missing)}; the row has {', '.join(row)}")
        prompt, choices, answer = (row[self._fields[name]] for name in FIELDS)
        if not isinstance(choices, list | tuple) or not all(isinstance(one, str) and one for one in choices):
            raise RefusedRow("choices_not_texts", f"the choices are {kind_of(choices)}, expected a list of texts")
        if len(choices) < 2:
            raise RefusedRow("too_few_choices", f"{len(choices)} choice(s), expected at least 2")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise RefusedRow("answer_is_no_index", f"{answer!r}, expected 0 to {len(choices) - 1}")
        if self._chat:
            prompt = prompt_reader({})(row_id, {"prompt": prompt, "answer": answer})
        elif not isinstance(prompt, str) or not prompt:
            raise RefusedRow("prompt_not_text", f"the prompt is {kind_of(prompt)}, expected a text; or set chat: true")
        return Question(row_id, prompt, tuple(choices), answer)

    def _prompt_ids(self, questions: list[Question], tokenizer: ChatTokenizer) -> list[list[int]]:
        """At least one token each: the first token of a sequence has no probability."""
        if self._chat:
            asked = with_ids(self._file, [question.prompt for question in questions], tokenizer)
            return [prompt["prompt_ids"] for prompt in asked]
        begin = [tokenizer.bos_id] if tokenizer.writes_bos and tokenizer.bos_id is not None else []
        return each_of(
            self._file,
            questions,
            lambda asked: _ids_of(tokenizer, "prompt", asked.prompt, begin),
            lambda asked: asked.row_id,
        )


def _ids_of(tokenizer: ChatTokenizer, what: str, text: str, begin: Sequence[int] = ()) -> list[int]:
    ids = [*begin, *text_ids(tokenizer, text)]
    if not ids:
        raise RefusedRow("empty_text", f"the {what} {text!r} has no token")
    return ids


def _judged(asked: Question, sums: list[float]) -> dict[str, Any]:
    """A choice whose log-probability is no number is not chosen, and where none has any the model has not answered."""
    values = np.where(np.isnan(sums), -np.inf, sums)
    by_length = values / [len(choice) for choice in asked.choices]
    answered = bool(np.isfinite(values.max()))
    likely = np.exp(values - values.max()) if answered else np.zeros(len(values))
    return {
        "row_id": asked.row_id,
        "logprobs": sums,
        "accuracy": float(answered and int(values.argmax()) == asked.answer),
        "accuracy_norm": float(answered and int(by_length.argmax()) == asked.answer),
        "answer_probability": float(likely[asked.answer] / max(likely.sum(), 1.0)),
    }
