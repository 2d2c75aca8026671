"""Scores of whole documents by a reward model: for evaluation, and for the reward of completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead

TokenIds = np.ndarray | Sequence[int]


@torch.no_grad()
def score_documents(
    model: Decoder,
    documents: Sequence[TokenIds],
    row_tokens: int,
    *,
    pad_token_id: int | None = None,
    precision: str = "fp32",
) -> np.ndarray:
    """float32 [n]: the score of each document, those of like length packed into rows; up to rounding, what each has by
    itself and in any order.

    Args:
        model: a reward model (``models.score``), on any device. Ranks that share one give the same documents.
        documents: token ids, none empty.
        row_tokens: tokens of one forward, which bounds memory; a longer document has one of its own.
        pad_token_id: of the model's config.json: the score is then that of the last other token, as in transformers,
            wherever the padding stands. None: of the last token.
        precision: of the products, as ``train.precision`` has it.

    Raises:
        ModelError: the model has no score head. DataError: an empty document.
    """
    if not model.config.score_head:
        raise ModelError(
            "scores are asked of a model without a score head",
            got="a causal language model",
            expected="a sequence classification model with one label",
            fix="name the folder of a reward model",
        )
    arrays = [np.asarray(document, dtype=np.int64) for document in documents]
    if empty := [number for number, array in enumerate(arrays) if not len(array)]:
        raise DataError("an empty document has no score", where=f"document {empty[0]}", got=f"{len(empty)} of them")
    scores = np.empty(len(arrays), dtype=np.float32)
    device = model.embed_tokens.weight.device
    for numbers in _rows([len(array) for array in arrays], row_tokens):
        with autocast(device, precision):
            row = _score_row(model, [arrays[number] for number in numbers], pad_token_id, device)
        scores[numbers] = row.float().cpu().numpy()
    return scores


def check_reward_folder(folder: str | Path, where: str) -> int | None:
    """The ``pad_token_id`` of a reward model's folder, whose config alone is read.

    Args:
        where: the field that names it.

    Raises:
        ConfigError: no such folder. ModelError: it holds no model, or one without a score head.
    """
    if not Path(folder).is_dir():
        raise ConfigError(
            "there is no such folder",
            where=where,
            got=folder,
            expected="a reward model's folder, or the name of one, as RewardFlow/latest or models/judge",
        )
    spec = spec_from_folder(folder)
    if not spec.config.score_head:
        raise ModelError(
            "a model without a score head cannot judge",
            where=f"{where}: {folder}",
            got=spec.hf_config.get("architectures"),
            expected="a sequence classification model with one label, as RewardFlow exports",
        )
    padding = spec.hf_config.get("pad_token_id")
    return None if padding is None else int(padding)


def scored_position(token_ids: np.ndarray, pad_token_id: int | None) -> int:
    """The place of the token whose score is the document's: the last that is not padding, the first where all are."""
    if pad_token_id is None:
        return len(token_ids) - 1
    places = np.flatnonzero(token_ids != pad_token_id)
    return int(places[-1]) if len(places) else 0


def _rows(lengths: Sequence[int], row_tokens: int) -> Iterator[list[int]]:
    """Runs of document numbers, the longest first, that fit into one forward. Nothing is padded, so none is better."""
    row: list[int] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if row and tokens + lengths[number] > row_tokens:
            yield row
            row, tokens = [], 0
        row.append(number)
        tokens += lengths[number]
    if row:
        yield row


def _score_row(model: Decoder, row: Sequence[np.ndarray], pad_token_id: int | None, device: torch.device) -> Tensor:
    """[n] scores of documents in one packed forward."""
    lengths = np.array([len(array) for array in row])
    ends = lengths.cumsum()
    scored = ends - lengths + np.array([scored_position(array, pad_token_id) for array in row])
    index = torch.from_numpy(scored).to(device)

    def output(hidden_TD: Tensor, head: OutputHead) -> Tensor:
        return head.logits(hidden_TD[index])[:, 0]

    scores: Tensor = model(
        torch.from_numpy(np.concatenate(row)).to(device),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device),
        torch.from_numpy(np.append(0, ends).astype(np.int32)).to(device),
        int(lengths.max()),
        output,
    )
    return scores
