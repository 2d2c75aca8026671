"""What an evaluation task is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from posttrain_lib.evaluation.bootstrap import Estimate, Scores, estimate

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.models.decoder import Decoder

Need = Literal["held_out", "prompts"]


@dataclass(frozen=True)
class Given:
    """What a run gives to its tasks.

    Args:
        held_out: its held-out documents. row_tokens: length of a packed row, at least the longest document's.
        prompts: its held-out prompts, as the data step writes them: ``prompt_ids``, ``messages``, ``answer``,
            ``source``, ``row_id``.
        seed: of everything that a task draws.
    """

    held_out: TokenStore | None = None
    row_tokens: int = 4096
    prompts: Sequence[Mapping[str, Any]] = ()
    seed: int = 0


@dataclass(frozen=True)
class TaskResult:
    """``scores``: metric -> scores of the examples, the same examples in the same order for every model.
    ``examples``: what a person may want to see of each, plain values."""

    scores: Mapping[str, Scores]
    examples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    def metrics(self, seed: int) -> dict[str, Estimate]:
        """Each metric with its mean and 95% interval; one without an example of weight is left out."""
        found = {name: estimate(scores, seed) for name, scores in self.scores.items()}
        return {name: value for name, value in found.items() if value is not None}


class Task(Protocol):
    """One task; subclass it to inherit what most do not need.

    Attributes:
        name: as the table calls it.
        needs: what the run must have for it.
        metrics: names of its metrics, those of :meth:`compare` included.
    """

    name: str
    needs: frozenset[Need]
    metrics: tuple[str, ...]

    def files(self) -> tuple[str, ...]:
        """Paths of the rows that it reads itself; their content decides its result."""
        return ()

    def models(self) -> tuple[str, ...]:
        """Model folders that it reads itself, of the evaluated model's tokenizer; their content decides its result."""
        return ()

    def check(self) -> None:
        """Say before training what of its rows and names cannot be.

        Raises:
            ConfigError, DataError: naming field, file or row.
        """

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """Score the model, one score for each example and metric."""
        ...

    def compare(self, before: TaskResult, after: TaskResult) -> Mapping[str, Scores]:
        """Metrics that only two models together have, as a win rate."""
        return {}
