"""Task ``perplexity``: of the trained tokens of the held-out documents, whatever loss the run trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain_lib.errors import DataError
from posttrain_lib.evaluation.documents import DocumentLosses
from posttrain_lib.evaluation.perplexity import held_out_loss
from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


class Perplexity(Task):
    """exp of the weighted mean negative log-likelihood per trained token; overall and per source."""

    name = "perplexity"
    needs = frozenset({"held_out"})
    metrics = ("perplexity",)

    def run(self, model: Decoder, tokenizer: ChatTokenizer, given: Given) -> TaskResult:
        """One score for each document: its mean loss, weighed by its trained tokens."""
        from posttrain_lib.losses.sft import SFTLoss

        if given.held_out is None:
            raise DataError("the task perplexity needs held-out documents", where="evaluation.tasks")
        documents = DocumentLosses(given.held_out)
        held_out_loss(model, SFTLoss(), given.held_out, row_tokens=given.row_tokens, observe=documents)
        return TaskResult({"perplexity": documents.scores(exponential=True)})
