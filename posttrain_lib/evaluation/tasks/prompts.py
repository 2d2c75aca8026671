"""Where a generating task gets its prompts: the run's held-out ones, or a file's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain_lib.data.probes import stop_ids
from posttrain_lib.errors import DataError
from posttrain_lib.evaluation.generation import greedy_generate, sample_generate
from posttrain_lib.evaluation.sampling import seed_of
from posttrain_lib.evaluation.tasks.rows import prompt_reader, read_rows, with_ids

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.evaluation.tasks.base import Given, Need
    from posttrain_lib.models.decoder import Decoder


@dataclass(frozen=True)
class Prompts:
    """The first ``count`` prompts of ``file``, rows of the format ``prompts``; without a file, of the run's own."""

    count: int
    file: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[Need]:
        """The run's own prompts, where no file is named."""
        return frozenset() if self.file else frozenset({"prompts"})

    def files(self) -> tuple[str, ...]:
        """As ``Task.files``."""
        return (self.file,) if self.file else ()

    def check(self) -> None:
        """Read the file's rows; DataError names those that cannot be used."""
        if self.file:
            read_rows(self.file, prompt_reader(self.fields), self.count)

    def take(self, tokenizer: ChatTokenizer, given: Given) -> list[Mapping[str, Any]]:
        """Rows with ``prompt_ids``, ``messages``, ``answer``, ``source`` and ``row_id``.

        Raises:
            DataError: there are none, or rows that cannot be used.
        """
        if self.file:
            rows = read_rows(self.file, prompt_reader(self.fields), self.count)
            return [*with_ids(self.file, rows, tokenizer)]
        found = [prompt for prompt in given.prompts if prompt["answer"] is not None][: self.count]
        if not found:
            raise DataError(
                "an evaluation task needs held-out prompts with answers, and the run has none",
                where="evaluation.tasks",
                expected="rows of conversations or prompts among those held out",
                fix="give the task a 'file' of its own",
            )
        return found


def completions_of(
    model: Decoder,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[list[int]]]:
    """``samples`` completions of each prompt as token ids, the stop token included; greedy at temperature 0."""
    ids = [prompt["prompt_ids"] for prompt in prompts for _ in range(samples)]
    stops = stop_ids(tokenizer)
    if temperature == 0:
        made = greedy_generate(model, ids, max_new_tokens, stops)
    else:
        seeds = [seed_of(seed, prompt["prompt_ids"], number) for prompt in prompts for number in range(samples)]
        made = sample_generate(model, ids, max_new_tokens, stops, seeds=seeds, temperature=temperature, top_p=top_p)
    return [made[first : first + samples] for first in range(0, len(made), samples)]
