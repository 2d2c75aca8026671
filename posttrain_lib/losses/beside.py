"""What stands beside the trained model: a frozen one, or what such a one said of the data before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain_lib.errors import ModelError
from posttrain_lib.models.lora import LoraDecoder, without_adapters

if TYPE_CHECKING:
    from posttrain_lib.data.signal_table import SignalTable
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class Beside:
    """A frozen model, or its stored words.

    Attributes:
        model: on the same ranks as the trained one; None: the trained model without its adapters.
        tables: by split ("train", "held_out"), what was stored; then no model runs.
    """

    model: Decoder | None = None
    tables: Mapping[str, SignalTable] = field(default_factory=dict)

    def run(self, trained: Decoder, batch: PackedBatch, output: Callable[[Tensor, OutputHead], Any]) -> Any:
        """``output(hidden_TD, head)`` of the frozen model on the batch, without gradients. It is called inside the
        frozen model's forward, where sharded weights are whole, and may run the trained model itself (under
        ``torch.set_grad_enabled``).

        Raises:
            ModelError: the trained model is to be its own base, and has no adapters, or DoRA.
        """
        model = trained if self.model is None else self.model
        if self.model is None and not isinstance(trained, LoraDecoder):
            raise ModelError(
                "the trained model has no adapters to leave out, so it would be compared with itself",
                where="model.lora",
                expected="adapters",
                fix="set model.lora, or take a reference that stands by itself",
            )
        off = without_adapters(trained) if isinstance(trained, LoraDecoder) and self.model is None else nullcontext()
        with off, torch.no_grad():
            return model(
                batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
            )
