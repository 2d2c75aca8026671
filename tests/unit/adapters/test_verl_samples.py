"""Samples as verl's DataProto and back, also through a pickle: the same samples."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.adapters import verl_samples
from posttrain_lib.adapters.verl_samples import from_proto, to_proto
from posttrain_lib.errors import DataError
from posttrain_lib.schema.rollouts import TrainSample


@st.composite
def batches(draw: st.DrawFn) -> list[TrainSample]:
    names = draw(st.lists(st.sampled_from(["advantages", "old_logprobs", "x/y"]), unique=True))
    samples = []
    for number in range(draw(st.integers(1, 5))):
        trained = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=9)))
        values = np.random.default_rng(number)
        signals = {name: values.normal(size=int(trained.sum())).astype(np.float32) for name in names}
        tokens = values.integers(0, 2**31 - 1, len(trained)).astype(np.int32)
        samples.append(
            TrainSample(tokens, trained, draw(st.integers(0, 9)), draw(st.integers(0, 2**40)), number, signals)
        )
    return samples


def same(left: list[TrainSample], right: list[TrainSample]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.signals.keys() == other.signals.keys()
        for name, values in one.signals.items():
            np.testing.assert_array_equal(values, other.signals[name], strict=True)
        for field in dataclasses.fields(TrainSample):
            found, expected = getattr(one, field.name), getattr(other, field.name)
            if isinstance(expected, np.ndarray):
                np.testing.assert_array_equal(found, expected, strict=True)
            elif field.name != "signals":
                assert found == expected and type(found) is type(expected)


@given(samples=batches())
def test_a_round_trip_changes_nothing(samples: list[TrainSample]) -> None:
    proto = to_proto(samples)
    assert len(proto) == len(samples)
    same(from_proto(proto), samples)
    same(from_proto(pickle.loads(pickle.dumps(proto))), samples)


def test_a_field_that_is_no_tensor_travels_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl_samples, "_NUMBERS", ("prompt_tokens", "index"))
    monkeypatch.setattr(verl_samples, "_AS_TENSORS", verl_samples._AS_TENSORS - {"group"})
    kept = [{"any": (1, 2)}, [3, 4]]
    samples = [TrainSample(np.arange(3, dtype=np.int32), np.arange(3) > 1, 1, group, 0) for group in kept]
    found = from_proto(pickle.loads(pickle.dumps(to_proto(samples))))
    assert [sample.group for sample in found] == kept


def test_signals_that_differ_or_do_not_fit_are_named() -> None:
    sample = TrainSample(np.arange(3, dtype=np.int32), np.arange(3) > 1, 1, 7, 2, {"a": np.zeros(1, np.float32)})
    with pytest.raises(DataError, match="sample 5 of group 7"):
        to_proto([sample, dataclasses.replace(sample, index=5, signals={})])
    with pytest.raises(DataError, match="sample 2 of group 7, a"):
        to_proto([dataclasses.replace(sample, signals={"a": np.zeros(2, np.float32)})])
