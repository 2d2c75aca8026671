"""Packed samples: every trained token with its own numbers, and the gradients of the samples alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import DataError
from posttrain_lib.losses.contract import tiny_decoder
from posttrain_lib.losses.policy import ADVANTAGES, ROLLOUT, PolicyLoss
from posttrain_lib.rl.packing import PackedSamples, by_sample, pack_samples
from posttrain_lib.schema.rollouts import TrainSample

VOCABULARY = tiny_decoder().config.vocab_size


def make_samples(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[TrainSample]:
    """Groups of (prompt tokens, tokens of each completion); some tokens within a completion are not trained."""
    draw = np.random.default_rng(seed)
    samples = []
    for group, (before, lengths) in enumerate(shapes):
        prompt = draw.integers(0, VOCABULARY, before)
        for number, length in enumerate(lengths):
            ids = np.concatenate([prompt, draw.integers(0, VOCABULARY, length)]).astype(np.int32)
            trained = np.arange(len(ids)) >= before
            trained[before : before + length - 1] &= draw.random(length - 1) < 0.8
            advantages = draw.normal(size=int(trained.sum())).astype(np.float32)
            samples.append(TrainSample(ids, trained, before, group, number, {ADVANTAGES: advantages}))
    return samples


groups = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5)), min_size=1, max_size=5
)


@given(groups, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_every_trained_token_is_there_once_with_its_numbers(
    shapes: list[tuple[int, list[int]]], world: int, rows: int, share: bool
) -> None:
    samples = make_samples(shapes)
    seen: dict[int, np.ndarray] = {}
    counts = set()
    for rank in range(world):
        packed = pack_samples(
            samples, row_tokens=16, micro_batch_rows=rows, rank=rank, world=world, share_prefixes=share
        )
        counts.add(len(packed.micro_batches))
        for batch in packed.micro_batches:
            for sample, values in by_sample([batch.signals[ADVANTAGES]], [batch], len(samples)).items():
                assert sample not in seen
                seen[sample] = values
                segments = np.searchsorted(batch.cu_seqlens, batch.supervised_index, side="right") - 1
                targets = batch.target_ids[batch.supervised_index][batch.document_ids[segments] == sample]
                assert targets.tolist() == samples[sample].token_ids[samples[sample].trained].tolist()
        assert packed.whole_tokens == sum(len(sample.token_ids) for sample in samples)
        assert packed.tokens <= packed.slots and (share or packed.tokens == packed.whole_tokens)
    assert len(counts) == 1, "ranks must meet as often"
    assert sorted(seen) == list(range(len(samples)))
    assert all(np.array_equal(seen[number], sample.signals[ADVANTAGES]) for number, sample in enumerate(samples))


def gradients(packed: PackedSamples) -> list[torch.Tensor]:
    """Of the policy loss, in float64: what is left between two orders of summation is rounding alone."""
    model = tiny_decoder().double()
    loss = PolicyLoss()
    for arrays in packed.micro_batches:
        batch = to_torch(dataclasses.replace(arrays, signals=loss.signals(arrays, "train")))
        loss(model, batch).local_sum.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_a_shared_prompt_changes_no_gradient() -> None:
    samples = make_samples([(5, [3, 6, 2, 4]), (1, [2, 2]), (9, [1, 7, 5])])
    shared = pack_samples(samples, row_tokens=40, micro_batch_rows=2)
    alone = pack_samples(samples, row_tokens=16, share_prefixes=False)
    assert shared.tokens < alone.tokens
    # the loss weights are float32 numbers that both read alike; the rest is float64
    for left, right in zip(gradients(shared), gradients(alone), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


def test_a_batch_is_as_long_as_its_longest_row() -> None:
    packed = pack_samples(make_samples([(4, [4]), (4, [6])]), row_tokens=1000)
    assert [batch.num_tokens for batch in packed.micro_batches] == [18]


def test_ranks_without_rows_take_part() -> None:
    samples = make_samples([(2, [3])])
    packed = [pack_samples(samples, row_tokens=8, rank=rank, world=2) for rank in range(2)]
    assert [len(each.micro_batches) for each in packed] == [1, 1]
    trained = [len(each.micro_batches[0].supervised_index) for each in packed]
    assert sorted(trained) == [0, samples[0].trained.sum()]
    nothing = packed[trained.index(0)]
    assert nothing.micro_batches[0].signals[ADVANTAGES].shape == (0,)
    assert not any(bool(gradient.any()) for gradient in gradients(nothing))


def test_an_odd_number_of_rows_is_learned_by_two_ranks_as_by_one() -> None:
    samples = make_samples([(5, [3, 6, 2, 4]), (1, [2, 2]), (9, [1, 7, 5])])
    each = [pack_samples(samples, row_tokens=24, rank=rank, world=2) for rank in range(2)]
    assert any(not len(batch.supervised_index) for packed in each for batch in packed.micro_batches)
    alone = gradients(pack_samples(samples, row_tokens=24))
    # float64 sums in another order
    for left, right, whole in zip(*map(gradients, each), alone, strict=True):
        torch.testing.assert_close(left + right, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": np.zeros(30, np.int32), "trained": np.arange(30) > 3}, "does not fit"),
        ({"trained": np.zeros(8, bool)}, "not behind its prompt"),
        ({"trained": np.arange(8) >= 3}, "not behind its prompt"),
        ({"signals": {ADVANTAGES: np.zeros(2, np.float32)}}, "not one number a trained token"),
        ({"signals": {ROLLOUT: np.array([0, 0, np.nan, 0], np.float32)}}, "rollout_logprobs, trained token 2"),
        ({"signals": {ROLLOUT: np.array([0, -np.inf, 0, 0], np.float32)}}, "no finite number"),
        ({"signals": {ROLLOUT: np.array([np.inf, 0, 0, 0], np.float32)}}, "no finite number"),
    ],
)
def test_what_cannot_be_packed_is_named(change: dict[str, object], said: str) -> None:
    sample = TrainSample(np.arange(8, dtype=np.int32), np.arange(8) >= 4, 4, 7, 2, {})
    with pytest.raises(DataError, match=said) as told:
        pack_samples([dataclasses.replace(sample, **change)], row_tokens=16)  # type: ignore[arg-type]
    assert "sample 2 of group 7" in str(told.value)


def test_a_group_with_two_prompts_is_refused() -> None:
    first, second = (TrainSample(np.full(6, fill, np.int32), np.arange(6) >= 4, 4, 0, fill, {}) for fill in (1, 2))
    with pytest.raises(DataError, match="different prompts"):
        pack_samples([first, second], row_tokens=32)
