"""Log-probabilities among allowed tokens: the dense reference's values and gradients, and no more memory than said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.allowed_logprobs import allowed_logprobs
from posttrain_lib.ops.head_reference import allowed_logprobs_reference, token_logprobs_reference
from posttrain_lib.ops.linear_cross_entropy import token_logprobs
from posttrain_lib.ops.output_head import VocabularyShard
from posttrain_lib.schema.allowed_sets import AllowedSets
from tests.unit.ops.head_cases import (
    EVERYTHING,
    REAL,
    Case,
    LargestTensor,
    Options,
    any_options,
    assert_all_close,
    assert_near_in,
    make_case,
)


def sets_of(case: Case, sizes: list[int], seed: int = 0) -> AllowedSets:
    """A set for each size, small ones first, and tokens of all of them and of none; every target is in its set."""
    generator = np.random.default_rng(seed)
    number = generator.integers(-1, len(sizes), len(case.index))
    targets = case.targets[case.index].numpy()
    sets = []
    for place, size in enumerate(sizes):
        own = np.unique(targets[number == place])
        others = np.setdiff1d(np.arange(REAL), own)
        sets.append(np.sort(np.append(own, generator.permutation(others)[: max(0, size - len(own))])))
    order = np.argsort([len(ids) for ids in sets], kind="stable")
    rank = np.append(np.argsort(order), -1)
    ordered = [sets[place] for place in order]
    offsets = np.append(0, np.cumsum([len(ids) for ids in ordered]))
    ids = np.concatenate([np.zeros(0, np.int64), *ordered])
    return AllowedSets(rank[number], ids, offsets.astype(np.int64)).map(torch.from_numpy)


def mask_of(sets: AllowedSets, entries: int) -> Tensor:
    mask = torch.ones(len(sets.set_of), entries, dtype=torch.bool)
    for row, number in enumerate(sets.set_of.tolist()):
        if number >= 0:
            mask[row] = False
            mask[row, sets.ids[sets.offsets[number] : sets.offsets[number + 1]]] = True
    return mask


def with_gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Values and gradients of a sum in which every value has a factor of its own."""
    factors = torch.linspace(0.5, 2, 2 * len(results[0]), dtype=results[0].dtype).view(2, -1)
    total = sum((factor * result).sum() for factor, result in zip(factors, results, strict=True))
    return [*results, *torch.autograd.grad(total, inputs)]


def ours(case: Case, sets: AllowedSets, temperature: float, chunk_entries: int = 1 << 20) -> list[Tensor]:
    logprobs, entropy = allowed_logprobs(
        case.hidden,
        case.head,
        case.targets,
        case.index,
        sets,
        temperature=temperature,
        with_entropy=True,
        chunk_entries=chunk_entries,
    )
    assert entropy is not None
    return with_gradients((logprobs, entropy), case.inputs())


def theirs(case: Case, sets: AllowedSets, temperature: float) -> list[Tensor]:
    mask = mask_of(sets, case.head.entries)
    found = allowed_logprobs_reference(case.hidden, case.head, case.targets, case.index, mask, temperature=temperature)
    return with_gradients(found, case.inputs())


@given(
    count=st.integers(1, 25),
    sizes=st.lists(st.integers(1, REAL), min_size=1, max_size=6),
    options=any_options,
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    chunk_entries=st.sampled_from([1, 40, 1 << 20]),
)
def test_values_and_gradients_are_the_full_softmaxs(
    count: int, sizes: list[int], options: Options, temperature: float, chunk_entries: int
) -> None:
    case = make_case(count, options)
    sets = sets_of(case, sizes)
    # float64: sums of a few dozen terms of about 10, in another order
    assert_all_close(ours(case, sets, temperature, chunk_entries), theirs(case, sets, temperature), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_is_as_near_as_the_whole_heads(dtype: torch.dtype) -> None:
    case = make_case(20, EVERYTHING)
    sets = sets_of(case, [3, 9, 20])
    assert_near_in(dtype, ours(case.to(dtype), sets, 0.7), theirs(case.to(dtype).to(torch.float64), sets, 0.7))


def test_everything_allowed_is_the_whole_head() -> None:
    case = make_case(12, EVERYTHING)
    everything = AllowedSets(
        torch.zeros(12, dtype=torch.int64), torch.arange(REAL), torch.tensor([0, REAL], dtype=torch.int64)
    )
    reference = token_logprobs_reference(case.hidden, case.head, case.targets, case.index, temperature=0.8)
    # float64 sums in another order
    assert_all_close(ours(case, everything, 0.8), with_gradients(reference, case.inputs()), atol=1e-10)


def test_without_sets_it_is_any_tokens_log_probability() -> None:
    case = make_case(7)
    expected, _ = token_logprobs(case.hidden, case.head, case.targets, case.index)
    nothing = AllowedSets(torch.full((7,), -1), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for sets in (None, nothing):
        found, entropy = allowed_logprobs(case.hidden, case.head, case.targets, case.index, sets)
        assert torch.equal(found, expected) and entropy is None


def test_a_batch_without_tokens_belongs_to_the_graph() -> None:
    case = make_case(0)
    sets = AllowedSets(*(torch.zeros(count, dtype=torch.int64) for count in (0, 0, 1)))
    logprobs, _ = allowed_logprobs(case.hidden, case.head, case.targets, case.index, sets)
    gradients = torch.autograd.grad(logprobs.sum(), case.inputs())
    assert not any(gradient.any() for gradient in gradients)


def test_only_rows_that_are_allowed_are_read() -> None:
    case = make_case(20)
    sets = sets_of(case, [2, 4])
    sets = replace(sets, set_of=sets.set_of.clamp(min=0))
    others = np.setdiff1d(np.arange(REAL), sets.ids.numpy())
    with torch.no_grad():
        case.head.weight_VD[others] = float("nan")
    reference = [part for part in ours(case, sets, 1.0)[:2]]
    assert all(part.isfinite().any() for part in reference)
    targets_in = mask_of(sets, REAL).gather(1, case.targets[case.index, None]).squeeze(1)
    assert reference[0][targets_in].isfinite().all()


def test_a_chunks_logits_are_bounded() -> None:
    case = make_case(25)
    sets = sets_of(case, [8] * 4)
    sets = replace(sets, set_of=sets.set_of.clamp(min=0))
    with LargestTensor() as seen:
        allowed_logprobs(case.hidden, case.head, case.targets, case.index, sets, chunk_entries=64)
    assert seen.products and all(rows * columns <= 64 for rows, columns in seen.products)


@pytest.mark.parametrize("chunk_entries", [40, 400])
def test_a_chunks_rows_of_the_head_are_bounded(chunk_entries: int) -> None:
    """However few tokens sets have: side by side they would be more than the head itself."""
    case = make_case(25)
    sets = sets_of(case, [8] * 12)
    sets = replace(sets, set_of=sets.set_of.clamp(min=0))
    largest = int(sets.offsets.diff().max())
    with LargestTensor() as seen:
        allowed_logprobs(case.hidden, case.head, case.targets, case.index, sets, chunk_entries=chunk_entries)
    bound = max(largest, chunk_entries // case.hidden.shape[1])
    assert seen.products and max(columns for _, columns in seen.products) <= bound


def test_a_sharded_vocabulary_is_refused() -> None:
    case = make_case(4)

    class Two:
        def size(self) -> int:
            return 2

    head = replace(case.head, shard=VocabularyShard(Two(), 0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whole output head"):
        allowed_logprobs(case.hidden, head, case.targets, case.index, sets_of(case, [3]))
