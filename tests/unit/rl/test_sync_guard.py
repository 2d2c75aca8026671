"""The guard stops a run in the very push that goes wrong: on the way, and behind the engine's door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain_lib.errors import RolloutError
from posttrain_lib.evaluation.generation import token_logprobs
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.engine.weights import hf_weights
from posttrain_lib.rl.sync_guard import Digest, SyncGuard, digest_of
from tests.oracles.tiny_job import write_model
from tests.support.engines import drained, loaded, request

CANARIES = [[1, 2, 3, 4, 5], [60, 50, 40], [7] * 9]
#: trainer and engine run the same function on the same float32 weights: they differ by nothing
BOUND = 1e-6

Weights = Iterator[tuple[str, Tensor]]
Fault = Callable[[Weights, Weights], Weights]


def without_a_layer(new: Weights, old: Weights) -> Weights:
    """A layer's tensors do not come."""
    return (pair for pair in new if ".layers.1." not in pair[0])


def with_an_old_layer(new: Weights, old: Weights) -> Weights:
    """A layer's tensors are those from before."""
    for (name, value), (_, before) in zip(new, old, strict=True):
        yield name, before if ".layers.1." in name else value


def with_two_swapped(new: Weights, old: Weights) -> Weights:
    """Two weights of one shape are in each other's place."""
    first, second = (f"model.layers.0.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm"))
    values = dict(new)
    values[first], values[second] = values[second], values[first]
    yield from values.items()


def kept_old(new: Weights, old: Weights) -> Weights:
    """Everything is read, and what was there before stays."""
    list(new)
    return old


FAULTS = [without_a_layer, with_an_old_layer, with_two_swapped, kept_old]


class Faulty(EmbeddedEngine):
    """An engine that is given other weights than those that were sent, or whose loading is wrong behind receipt."""

    def __init__(self, model: Decoder, spec: ModelSpec, fault: Fault, *, behind_receipt: bool) -> None:
        super().__init__(model, spec, window=64, slots=2)
        self.own, self.spec, self.fault, self.behind_receipt = model, spec, fault, behind_receipt

    def push(self, weights: Weights, version: int) -> str:
        received = Digest()
        old = iter([(name, value.clone()) for name, value in hf_weights(self.own, self.spec)])
        found = super().push(self.fault(received.through(weights), old), version)
        return received.text() if self.behind_receipt else found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def trained(model: Decoder, size: float) -> None:
    """An update of every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape)


def scored(model: Decoder) -> Callable[[list[list[int]]], list[np.ndarray]]:
    return lambda sequences: [np.array(values, dtype=np.float32) for values in token_logprobs(model, sequences)]


def test_good_pushes_pass_and_say_what_they_proved(folder: Path) -> None:
    (policy, spec), (model, _) = loaded(folder, torch.float32), loaded(folder, torch.float32)
    engine, guard = EmbeddedEngine(model, spec, window=64, slots=2), SyncGuard(CANARIES, bound=BOUND)
    for version in (1, 2, 2):
        trained(policy, 1e-3)
        synced = guard.push(engine, hf_weights(policy, spec), version, scored(policy))
        assert (synced.version, synced.digest) == (version, digest_of(hf_weights(policy, spec)))
        assert synced.difference <= BOUND
    guard.push(engine, hf_weights(policy, spec), 3, scored(policy))  # the same weights again are no fault
    assert drained(engine, [request("a", [1])])["a"].versions.tolist() == [3] * 8


@pytest.mark.parametrize("behind_receipt", [False, True], ids=["on the way", "behind receipt"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_push_stops_the_run_in_that_push(folder: Path, fault: Fault, behind_receipt: bool) -> None:
    (policy, spec), (model, _) = loaded(folder, torch.float32), loaded(folder, torch.float32)
    engine = Faulty(model, spec, lambda new, old: new, behind_receipt=behind_receipt)
    guard = SyncGuard(CANARIES, bound=BOUND)
    trained(policy, 1e-3)
    guard.push(engine, hf_weights(policy, spec), 1, scored(policy))
    engine.fault = fault
    trained(policy, 1e-3)
    expected = "not given all" if fault is without_a_layer else "canary" if behind_receipt else "digest"
    with pytest.raises(RolloutError, match=expected):
        guard.push(engine, hf_weights(policy, spec), 2, scored(policy))


def test_old_weights_are_seen_however_small_the_update(folder: Path) -> None:
    """A bound that must cover bfloat16 is wider than one step of a small learning rate; equal bits are not chance."""
    (policy, spec), (model, _) = loaded(folder, torch.float32), loaded(folder, torch.float32)
    engine, guard = Faulty(model, spec, lambda new, old: new, behind_receipt=True), SyncGuard(CANARIES, bound=0.1)
    guard.push(engine, hf_weights(policy, spec), 1, scored(policy))
    engine.fault = kept_old
    trained(policy, 1e-6)
    with pytest.raises(RolloutError, match="the log-probabilities of the weights before"):
        guard.push(engine, hf_weights(policy, spec), 2, scored(policy))


def test_an_update_too_small_for_the_engines_bits_is_no_fault(folder: Path) -> None:
    """As the last ones of a schedule that ends at 0: a few weights change, and no log-probability."""
    (policy, spec), (model, _) = loaded(folder, torch.float32), loaded(folder, torch.float32)
    engine, guard = EmbeddedEngine(model, spec, window=64, slots=2), SyncGuard(CANARIES, bound=BOUND)
    guard.push(engine, hf_weights(policy, spec), 1, scored(policy))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter[parameter.abs() < 1e-3] += 1e-11
    found = guard.push(engine, hf_weights(policy, spec), 2, scored(policy))
    assert found.digest != digest_of(hf_weights(loaded(folder, torch.float32)[0], spec))


def test_old_weights_are_seen_once_small_updates_have_added_up(folder: Path) -> None:
    (policy, spec), (model, _) = loaded(folder, torch.float32), loaded(folder, torch.float32)
    engine, guard = Faulty(model, spec, lambda new, old: new, behind_receipt=True), SyncGuard(CANARIES, bound=0.1)
    guard.push(engine, hf_weights(policy, spec), 1, scored(policy))
    engine.fault = kept_old
    step = {name: 3e-8 * torch.randn(parameter.shape) for name, parameter in policy.named_parameters()}
    with pytest.raises(RolloutError, match="the log-probabilities of the weights before") as told:
        for version in range(2, 200):
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    parameter += step[name]
            guard.push(engine, hf_weights(policy, spec), version, scored(policy))
    assert "version 2" not in str(told.value.where)


def test_a_broken_score_is_no_proof(folder: Path) -> None:
    policy, spec = loaded(folder, torch.float32)
    engine = EmbeddedEngine(loaded(folder, torch.float32)[0], spec, window=64, slots=2)
    with pytest.raises(RolloutError, match="nan from the trainer"):
        SyncGuard(CANARIES, bound=1e9).push(
            engine, hf_weights(policy, spec), 1, lambda sequences: [np.full(len(s) - 1, np.nan) for s in sequences]
        )


def test_the_digest_sees_names_shapes_dtypes_and_bytes_and_no_order() -> None:
    value = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    weights = {"a": value, "b": value + 1, "c": torch.ones((), dtype=torch.bfloat16)}
    known = digest_of(weights.items())
    assert digest_of(reversed(weights.items())) == known
    assert digest_of({**weights, "a": value.t().contiguous().t()}.items()) == known, (
        "how it lies in memory is no matter"
    )
    changed = [
        {**weights, "a": weights["b"], "b": weights["a"]},
        {**weights, "a": value.reshape(4, 3)},
        {**weights, "a": value.view(torch.int32)},
        {**weights, "a": value.flip(0)},
        {name: tensor for name, tensor in weights.items() if name != "c"},
    ]
    assert len({known, *(digest_of(each.items()) for each in changed)}) == len(changed) + 1


def test_the_digest_reads_weights_once_and_passes_them_on() -> None:
    value, digest = torch.ones(3), Digest()
    passed = list(digest.through(iter([("a", value)])))
    assert passed[0][1] is value and digest.text() == digest_of([("a", value)])


SIZE = 512 * 512 * 4 + 321
PLACES = st.integers(0, SIZE - 1)


@given(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), st.sets(PLACES, min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_the_digest_sees_any_signs_that_changed(dtype: torch.dtype, places: set[int]) -> None:
    """The highest bit of an element: where sums modulo a power of two see least."""
    value = torch.ones(SIZE, dtype=dtype)
    known = digest_of([("a", value)])
    value[list(places)] *= -1
    assert digest_of([("a", value)]) != known


def test_the_digest_sees_every_single_sign() -> None:
    """Of more and more elements, in rows and behind them: no state is like another."""
    value = torch.randn(2 * 2048 + 7).bfloat16()
    found = {digest_of([("a", value)])}
    for place in range(len(value)):
        value[place] *= -1
        found.add(digest_of([("a", value)]))
    assert len(found) == len(value) + 1


@pytest.mark.parametrize("size", [64, 128, 512, 1024])
def test_the_digest_sees_what_was_put_elsewhere(size: int) -> None:
    value = torch.randn(size, size, dtype=torch.float64)
    swapped_rows, swapped_words = value.clone(), value.clone()
    swapped_rows[[1, 2]] = value[[2, 1]]
    swapped_words[1, 2], swapped_words[2, 1] = value[2, 1], value[1, 2]
    halves = torch.cat([value[size // 2 :], value[: size // 2]])
    others = [value, value.t(), value.flip(0), value.flip(1), value.roll(1), swapped_rows, swapped_words, halves]
    assert len({digest_of([("a", other)]) for other in others}) == len(others)


def test_what_a_tensor_becomes_later_is_no_matter() -> None:
    """Its memory is given to the next one."""
    for size in (3, 2048, 2048 + 3):
        value, digest = torch.randn(size), Digest()
        known = digest_of([("a", value)])
        digest.add("a", value)
        value.zero_()
        assert digest.text() == known
