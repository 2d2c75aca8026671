"""Samples as verl's worker groups carry them: a DataProto of padded tensors, one row a sample.

    input_ids        int32 [B, S]    token ids, 0 behind a sample's end
    attention_mask   bool [B, S]     where a sample has tokens
    loss_mask        bool [B, S]     its trained tokens
    prompt_tokens, group, index      int64 [B]
    signal/<name>    float32 [B, N]  one number a trained token, in order, 0 behind the last

What else a sample has travels as it is, an object a row. Nothing behind this file knows of padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl import DataProto

from posttrain_lib.errors import DataError
from posttrain_lib.rl.packing import check_signals
from posttrain_lib.schema.rollouts import TrainSample

_NUMBERS = ("prompt_tokens", "group", "index")
_AS_TENSORS = {"token_ids", "trained", "signals", *_NUMBERS}
_SIGNAL = "signal/"


def to_proto(samples: Sequence[TrainSample]) -> DataProto:
    """The samples, at least one, as one DataProto.

    Raises:
        DataError: the samples have not all the same signals, or a signal is not one number a trained token.
    """
    names = sorted(samples[0].signals)
    for sample in samples:
        _check_signals(sample, names)
    tensors = {
        "input_ids": _padded([sample.token_ids for sample in samples], np.int32),
        "attention_mask": _padded([np.ones(len(sample.token_ids)) for sample in samples], np.bool_),
        "loss_mask": _padded([sample.trained for sample in samples], np.bool_),
        **{name: torch.tensor([getattr(sample, name) for sample in samples]) for name in _NUMBERS},
        **{_SIGNAL + name: _padded([sample.signals[name] for sample in samples], np.float32) for name in names},
    }
    return DataProto.from_dict(tensors, {name: _objects(samples, name) for name in _others()})


def from_proto(proto: DataProto) -> list[TrainSample]:
    """The samples again, each array of its own length."""
    arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in proto.batch.items()}
    samples = []
    for row in range(len(proto)):
        tokens = int(arrays["attention_mask"][row].sum())
        trained = arrays["loss_mask"][row, :tokens]
        count = int(trained.sum())
        signals = {
            name.removeprefix(_SIGNAL): values[row, :count]
            for name, values in arrays.items()
            if name.startswith(_SIGNAL)
        }
        others: dict[str, Any] = {
            **{name: int(arrays[name][row]) for name in _NUMBERS},
            **{name: proto.non_tensor_batch[name][row] for name in _others()},
        }
        samples.append(TrainSample(arrays["input_ids"][row, :tokens], trained, signals=signals, **others))
    return samples


def _others() -> list[str]:
    return [each.name for each in dataclasses.fields(TrainSample) if each.name not in _AS_TENSORS]


def _objects(samples: Sequence[TrainSample], name: str) -> np.ndarray:
    found: np.ndarray[Any, np.dtype[np.object_]] = np.empty(len(samples), object)
    for row, sample in enumerate(samples):  # one by one: numpy would take equally long lists apart
        found[row] = getattr(sample, name)
    return found


def _padded(rows: Sequence[np.ndarray], dtype: Any) -> Tensor:
    found = np.zeros((len(rows), max(len(row) for row in rows)), dtype)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return torch.from_numpy(found)


def _check_signals(sample: TrainSample, names: list[str]) -> None:
    where = f"sample {sample.index} of group {sample.group}"
    if sorted(sample.signals) != names:
        raise DataError("the samples have different signals", where=where, got=sorted(sample.signals), expected=names)
    check_signals(sample)
