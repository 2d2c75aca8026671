"""Knowledge distillation: a teacher's distribution over the next token, at every trained token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.base import Loss, LossOutput, weighted_figure
from posttrain_lib.ops.head_divergence import Divergence, linear_divergence, linear_top_divergence
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from posttrain_lib.losses.beside import Beside
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


class DistillLoss(Loss):
    """``sum_t w_t * ((1 - hard_weight) * temperature^2 * D_t + hard_weight * -log q(target_t))``, to be divided by the
    global ``sum_t w_t`` (Hinton et al. 2015, eq. 1 and 2). ``D`` compares teacher p and student q at the temperature;
    see ``ops.head_divergence``. The cross-entropy is at temperature 1.

    The teacher's weights of a step are the tokens' own: what is masked in SFT is masked here. A live teacher runs in
    the same step, the student inside of its forward, so that both heads are whole at once and neither's logits are.
    A stored teacher has ``ids`` and ``logprobs`` of its most likely tokens by trained token.
    """

    needs = "teacher"

    def __init__(
        self,
        divergence: Divergence = "forward",
        mix: float = 0.5,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
    ) -> None:
        if not 0.0 <= hard_weight < 1.0:
            raise ConfigError("hard_weight lies outside 0 to 1", where="distill.hard_weight", got=hard_weight)
        self.divergence, self.mix = divergence, mix
        self.temperature, self.hard_weight = temperature, hard_weight
        self.figures = ("distill/divergence", *(["distill/cross_entropy"] if hard_weight else []))

    def attach(self, beside: Beside) -> None:
        """Take the teacher.

        Raises:
            ConfigError: stored log-probs cannot give this divergence, or are of another temperature.
        """
        for table in beside.tables.values():
            stored, entries = (table.made_of.get(name) for name in ("temperature", "entries"))
            if self.divergence != "forward" or stored != str(self.temperature) or entries is None:
                raise ConfigError(
                    "the teacher's stored log-probs do not fit the loss",
                    where=table.folder,
                    got=f"temperature {stored}, top tokens alone, of {entries or 'no known number of'} entries",
                    expected=f"temperature {self.temperature}, divergence {self.divergence}",
                    fix="store them again (step score_data), or set distill.teacher.kept: live",
                )
            self.stored_entries = int(entries)
        self.beside = beside

    @property
    def _attached(self) -> Beside:
        if self.beside is None:
            raise ConfigError("the loss compares with a teacher and has none", fix="call attach() before a step")
        return self.beside

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """The stored teacher's: ``ids`` int64 and ``logprobs`` float32, [N, K]."""
        if not self._attached.tables:
            return {}
        found = self._attached.tables[split].of_tokens(batch)
        # Rounded in the store, they no longer add up to 1.
        kept, rest = (np.exp(found[name].astype(np.float32)) for name in ("logprobs", "rest"))
        total = kept.sum(axis=1, keepdims=True) + rest[:, None]
        return {"ids": found["ids"].astype(np.int64), "logprobs": found["logprobs"].astype(np.float32) - np.log(total)}

    def divisor(self, batch: PackedBatch) -> float:
        """Sum of the loss weights."""
        return batch.weight

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """Both forwards; logits exist only in chunks of supervised rows."""
        if batch.signals:
            return self._output(batch, *self._student(model, batch, None, None))

        trains = torch.is_grad_enabled()

        def with_teacher(hidden_TE: Tensor, head: OutputHead) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.set_grad_enabled(trains):
                return self._student(model, batch, hidden_TE, head)

        return self._output(batch, *self._attached.run(model, batch, with_teacher))

    def _student(
        self, model: Decoder, batch: PackedBatch, teacher_TE: Tensor | None, teacher_head: OutputHead | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(local sum, divergence [N], cross-entropy [N] or None)."""
        soft = (1.0 - self.hard_weight) * self.temperature**2

        def output(hidden_TD: Tensor, head: OutputHead) -> tuple[Tensor, Tensor, Tensor | None]:
            weights, index = batch.loss_weights, batch.supervised_index
            if teacher_TE is None or teacher_head is None:
                own = _with_entries(head, min(head.entries, self.stored_entries))
                ids, logprobs = batch.signals["ids"], batch.signals["logprobs"]
                total, values = linear_top_divergence(
                    hidden_TD, own, ids, logprobs, weights, index, temperature=self.temperature
                )
            else:
                entries = min(head.entries, teacher_head.entries)
                own, others = _with_entries(head, entries), _with_entries(teacher_head, entries)
                total, values = linear_divergence(
                    hidden_TD, own, teacher_TE, others, weights, index,
                    divergence=self.divergence, mix=self.mix, temperature=self.temperature,
                )  # fmt: skip
            total = total * soft
            if not self.hard_weight:
                return total, values, None
            hard, nll = linear_cross_entropy(hidden_TD, head, batch.target_ids, weights, index)
            return total + self.hard_weight * hard, values, nll

        found: tuple[Tensor, Tensor, Tensor | None] = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        return found

    def _output(self, batch: PackedBatch, total: Tensor, divergence_N: Tensor, nll_N: Tensor | None) -> LossOutput:
        weights = batch.loss_weights[batch.supervised_index]
        values = divergence_N * ((1.0 - self.hard_weight) * self.temperature**2)
        figures = {"distill/divergence": weighted_figure(divergence_N, weights)}
        if nll_N is not None:
            values = values + self.hard_weight * nll_N
            figures["distill/cross_entropy"] = weighted_figure(nll_N, weights)
        return LossOutput.of_tokens(total, values, batch, figures)


def _with_entries(head: OutputHead, entries: int) -> OutputHead:
    """A head on the entries that student and teacher both have: families pad one tokenizer's vocabulary to different
    sizes. That the tokenizers are one is checked before training starts."""
    return dataclasses.replace(head, vocab_size=entries)
