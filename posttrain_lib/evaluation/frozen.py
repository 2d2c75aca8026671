"""What a frozen model says of every example of a store, written down as a signal table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.loader import held_out_batches
from posttrain_lib.data.signal_table import SignalWriter
from posttrain_lib.errors import ModelError
from posttrain_lib.losses.preference import document_logprobs
from posttrain_lib.models.spec import can_share_prefixes
from posttrain_lib.ops.head_topk import top_logprobs
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch

#: (examples done, examples in all), now and then
Progress = Callable[[int, int], None]


@torch.no_grad()
def store_document_logprobs(
    model: Decoder,
    store: TokenStore,
    folder: Path,
    made_of: Mapping[str, str],
    *,
    row_tokens: int,
    precision: str = "fp32",
    progress: Progress = lambda done, total: None,
) -> None:
    """Write ``logprob``, float64 by example: the log-probability of its trained tokens, summed. ``precision``: of the
    products, as ``train.precision``; a policy that computes in another differs from it before it has learned anything.

    Raises:
        ModelError: one is not finite; training would stop at its pair, maybe days later.
    """
    writer = SignalWriter(folder, store, "example", {"logprob": (np.float64, ())}, made_of)
    done = 0
    for arrays, batch in _batches(model, store, row_tokens):
        sums = _run(model, batch, document_logprobs(batch), precision).cpu().numpy()
        for segment, example in enumerate(arrays.document_ids.tolist()):
            if example >= 0:
                if not np.isfinite(sums[segment]):
                    raise ModelError(
                        "the frozen model gives an answer no log-probability",
                        where=f"{store.source(example)}: {store.row_id(example)}",
                        got=float(sums[segment]),
                        expected="a finite number",
                        fix="look at that row, and whether the model's own weights are finite",
                    )
                writer.put(example, {"logprob": sums[segment]})
                done += 1
        progress(done, len(store))
    writer.close()


@torch.no_grad()
def store_top_logprobs(
    model: Decoder,
    store: TokenStore,
    folder: Path,
    made_of: Mapping[str, str],
    *,
    row_tokens: int,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    precision: str = "fp32",
    progress: Progress = lambda done, total: None,
) -> None:
    """Write ``ids`` (uint16 where the vocabulary allows it, else int32) and ``logprobs`` (float16) by trained token,
    [top_k] each, the most likely first, and ``rest`` (float16), the log-probability of all other tokens together: 4 or
    6 bytes an entry and 2 a token. float16 keeps a log-probability to 1 part in 2048; with the rest stored by itself,
    that rounding never becomes mass on tokens that the teacher does not believe in.

    ``vocab_size``: the student's; what the teacher has besides is left out of its distribution. The table says how many
    entries that distribution has: a student of more is compared on these.
    """
    entries = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    small = entries <= np.iinfo(np.uint16).max + 1
    columns = {
        "ids": (np.uint16 if small else np.int32, (min(top_k, entries),)),
        "logprobs": (np.float16, (min(top_k, entries),)),
        "rest": (np.float16, ()),
    }
    how = {"temperature": str(temperature), "entries": str(entries)}
    writer = SignalWriter(folder, store, "token", columns, {**made_of, **how})
    done = 0
    for arrays, batch in _batches(model, store, row_tokens):

        def output(hidden_TD: Tensor, head: OutputHead, batch: PackedBatch = batch) -> tuple[Tensor, Tensor]:
            own = dataclasses.replace(head, vocab_size=entries)
            return top_logprobs(hidden_TD, own, batch.supervised_index, min(top_k, entries), temperature=temperature)

        logprobs, ids = (tensor.cpu().numpy() for tensor in _run(model, batch, output, precision))
        rest = _log_of_rest(logprobs)
        starts = np.searchsorted(arrays.supervised_index, arrays.cu_seqlens)
        for segment, example in enumerate(arrays.document_ids.tolist()):
            if example >= 0:
                own = slice(starts[segment], starts[segment + 1])
                writer.put(example, {"ids": ids[own], "logprobs": logprobs[own], "rest": rest[own]})
                done += 1
        progress(done, len(store))
    writer.close()


def _log_of_rest(logprobs_NK: np.ndarray) -> np.ndarray:
    """float64 [N]: the logarithm of what is left of 1; -inf where nothing is."""
    left = 1.0 - np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
    return np.log(left, out=np.full(len(left), -np.inf), where=left > 0)


def _batches(model: Decoder, store: TokenStore, row_tokens: int) -> Iterator[tuple[PackedBatch, PackedBatch]]:
    """The store's examples packed, as arrays and as tensors where the model is."""
    device = next(model.parameters()).device
    shared = can_share_prefixes(model.config, store.longest)
    for arrays in held_out_batches(store, row_tokens=row_tokens, share_prefixes=shared):
        yield arrays, to_torch(arrays, device)


def _run(model: Decoder, batch: PackedBatch, output: Callable[[Tensor, OutputHead], Any], precision: str) -> Any:
    with autocast(batch.token_ids.device, precision):
        return model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
