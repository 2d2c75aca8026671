"""The loader: the order is a pure function of (store, seed, position), whatever the ranks, prefetch and restarts."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.data.loader import (
    PREFETCHED_STEPS,
    LoadedStep,
    PackedLoader,
    count_steps,
    held_out_batches,
)
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.store_feed import MixtureSpec, StoreFeed
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import CheckpointError, DataError
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample

ROW_TOKENS = 48
#: a row of padding, as _rows gives it
_NOTHING = bytes(8 * ROW_TOKENS)
EXAMPLES = 90


def _make_store(folder: Path, examples: int = EXAMPLES, longest: int = ROW_TOKENS, seed: int = 0) -> TokenStore:
    rng = np.random.default_rng(seed)
    with TokenStoreWriter(folder, shard_tokens=300) as writer:
        for number in range(examples):
            length = min(longest, 1 + int(rng.lognormal(2.0, 0.8)))
            weights = rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)
            tokens = rng.integers(1, 1000, length).astype(np.int32)
            writer.add(TokenizedExample(tokens, weights, f"source-{number % 3}", f"rows:{number}"))
    return TokenStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return _make_store(tmp_path_factory.mktemp("store"))


def _loader(store: TokenStore, **changes: Any) -> PackedLoader:
    own = {"row_tokens": ROW_TOKENS, "rows_per_step": 4, "micro_batch_rows": 2, "packing_buffer": 8}
    of_feed = {"row_tokens": ROW_TOKENS, "seed": 3}
    for name, value in changes.items():
        if name in ("epochs", "seed", "window", "mixture", "share_prefixes", "row_tokens"):
            of_feed[name] = value
        if name not in ("epochs", "seed", "window", "mixture", "share_prefixes"):
            own[name] = value
    return PackedLoader(StoreFeed(store, **of_feed), **own)


def _count(store: TokenStore, rows_per_step: int, packing_buffer: int, **of_feed: Any) -> int:
    feed = StoreFeed(store, row_tokens=ROW_TOKENS, seed=3, **of_feed)
    return count_steps(feed, row_tokens=ROW_TOKENS, rows_per_step=rows_per_step, packing_buffer=packing_buffer)


def _take(loader: PackedLoader, steps: int) -> list[LoadedStep]:
    with loader:
        return [step for _ in range(steps) if (step := loader.next_step()) is not None]


def _digest(steps: list[LoadedStep]) -> str:
    """Every array of every batch, bit by bit, and the global figures."""
    seen = hashlib.sha256()
    for step in steps:
        seen.update(repr((step.step, step.global_weight, step.real_tokens, step.slot_tokens)).encode())
        for batch in step.micro_batches:
            for name in PackedBatch.ARRAYS:
                array = getattr(batch, name)
                seen.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return seen.hexdigest()


def _rows(step: LoadedStep) -> list[bytes]:
    """The step's rows on this rank, each as its token ids and loss weights."""
    return [
        batch.token_ids[begin : begin + ROW_TOKENS].tobytes() + batch.loss_weights[begin : begin + ROW_TOKENS].tobytes()
        for batch in step.micro_batches
        for begin in range(0, batch.num_tokens, ROW_TOKENS)
    ]


def test_a_batch_says_what_the_store_holds(store: TokenStore) -> None:
    for step in _take(_loader(store), 5):
        for batch in step.micro_batches:
            _check_batch(store, batch)


def _check_batch(store: TokenStore, batch: PackedBatch) -> None:
    bounds = batch.cu_seqlens
    assert bounds[0] == 0 and bounds[-1] == batch.num_tokens and (np.diff(bounds) > 0).all()
    assert batch.max_seqlen == np.diff(bounds).max()
    dtypes = {name: getattr(batch, name).dtype.name for name in PackedBatch.ARRAYS}
    assert dtypes == {
        "token_ids": "int32",
        "target_ids": "int32",
        "loss_weights": "float32",
        "positions": "int32",
        "cu_seqlens": "int32",
        "supervised_index": "int32",
        "document_sources": "int32",
        "document_ids": "int64",
    }
    real = 0
    for document, example in enumerate(batch.document_ids):
        begin, end = bounds[document], bounds[document + 1]
        assert batch.positions[begin:end].tolist() == list(range(end - begin))
        # No document crosses from one row into the next.
        assert begin // ROW_TOKENS == (end - 1) // ROW_TOKENS
        assert batch.target_ids[end - 1] == 0 and batch.loss_weights[end - 1] == 0
        if example == -1:
            assert batch.document_sources[document] == -1
            assert not batch.token_ids[begin:end].any() and not batch.loss_weights[begin:end].any()
            continue
        tokens, weights = store.get(example)
        real += len(tokens)
        assert batch.document_sources[document] == store.source_index[example]
        assert np.array_equal(batch.token_ids[begin:end], tokens)
        assert np.array_equal(batch.target_ids[begin : end - 1], tokens[1:])
        assert np.array_equal(batch.loss_weights[begin : end - 1], weights[1:])
    assert batch.real_tokens == real
    assert np.array_equal(batch.supervised_index, np.flatnonzero(batch.loss_weights))


@settings(max_examples=25)
@given(
    rows_per_step=st.integers(1, 9),
    micro_batch_rows=st.integers(1, 4),
    buffer=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    world=st.sampled_from([1, 2, 4]),
)
def test_ranks_share_one_stream_of_rows(
    store: TokenStore, rows_per_step: int, micro_batch_rows: int, buffer: int, seed: int, world: int
) -> None:
    options = {
        "rows_per_step": rows_per_step,
        "packing_buffer": buffer,
        "seed": seed,
        "micro_batch_rows": micro_batch_rows,
    }
    alone = _take(_loader(store, **{**options, "micro_batch_rows": 1}), 6)
    ranks = [_take(_loader(store, **options, rank=rank, world=world), 6) for rank in range(world)]
    for number, whole in enumerate(alone):
        steps = [steps[number] for steps in ranks]
        rows = [_rows(step) for step in steps]
        # Which rank has which row is a matter of cost; together they have the step's rows, and padding beside.
        spare = [_NOTHING] * (-rows_per_step % world)
        assert sorted(row for part in rows for row in part) == sorted([*_rows(whole), *spare])
        assert len({len(part) for part in rows}) == 1
        # Collective calls meet: as many micro-batches of the same size everywhere.
        assert len({tuple(batch.num_tokens for batch in step.micro_batches) for step in steps}) == 1
        # The figures are global on every rank, and the divisor is what the batches weigh. Weights are multiples of
        # 0.5, so their float64 sums are exact.
        assert len({(step.global_weight, step.real_tokens, step.slot_tokens) for step in [whole, *steps]}) == 1
        assert sum(batch.weight for step in steps for batch in step.micro_batches) == whole.global_weight
        assert sum(batch.real_tokens for step in steps for batch in step.micro_batches) == whole.real_tokens


@settings(max_examples=25)
@given(
    before=st.integers(0, 12),
    after=st.integers(0, 12),
    world=st.sampled_from([1, 2]),
    buffer=st.integers(1, 120),
    epochs=st.sampled_from([None, 2.5]),
)
def test_resumed_equals_uninterrupted(
    store: TokenStore, before: int, after: int, world: int, buffer: int, epochs: float | None
) -> None:
    options = {"packing_buffer": buffer, "epochs": epochs, "rank": world - 1, "world": world}
    whole = _take(_loader(store, **options), before + after)
    first = _loader(store, **options)
    taken = _take(first, before)
    resumed = _loader(store, **options)
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert _digest(whole) == _digest(taken + _take(resumed, after))


def test_a_position_moves_to_other_numbers_of_ranks(store: TokenStore) -> None:
    """One rank all along, against 4, then 2, then 8: the same rows in every step."""
    whole = [sorted(_rows(step)) for step in _take(_loader(store, rows_per_step=8), 9)]
    found: list[list[bytes]] = []
    state = None
    for world in (4, 2, 8):
        loaders = [_loader(store, rows_per_step=8, micro_batch_rows=1, rank=r, world=world) for r in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state(state)
        ranks = [_take(loader, 3) for loader in loaders]
        found += [sorted(row for steps in ranks for row in _rows(steps[number])) for number in range(3)]
        states = [json.dumps(loader.state()) for loader in loaders]
        assert len(set(states)) == 1  # whichever rank writes the checkpoint
        state = json.loads(states[0])
    assert found == whole


def test_the_rows_of_ranks_cost_about_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TokenStoreWriter(tmp_path) as writer:
        for number in range(2000):
            length = int(min(512, max(4, rng.lognormal(3.5, 1.2))))
            writer.add(TokenizedExample(np.ones(length, np.int32), np.ones(length, np.float32), "s", str(number)))
    feed = {"row_tokens": 512, "rows_per_step": 64, "packing_buffer": 256}
    steps = [_take(_loader(TokenStore(tmp_path), **feed, pair_cost=1.0, rank=r, world=8), 3) for r in range(8)]
    for number in range(3):
        costs = [
            sum(512 * len(batch.token_ids) / 512 + (np.diff(batch.cu_seqlens) ** 2 / 2)[batch.document_ids >= 0].sum()
                for batch in ranks[number].micro_batches)
            for ranks in steps
        ]  # fmt: skip
        assert max(costs) / np.mean(costs) <= 1.02


def test_data_made_in_the_loop_or_beside_it_is_the_same(store: TokenStore) -> None:
    beside, within = _loader(store), _loader(store, background=False)
    assert _digest(_take(beside, 8)) == _digest(_take(within, 8))
    assert beside.state() == within.state()


def test_the_position_is_the_consumed_one(store: TokenStore) -> None:
    loader = _loader(store)
    before = copy.deepcopy(loader.state())
    loader.next_step()
    after = copy.deepcopy(loader.state())
    deadline = time.monotonic() + 10
    while loader._queue.qsize() < PREFETCHED_STEPS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader._queue.qsize() == PREFETCHED_STEPS  # there is something ahead that could leak
    assert loader.state() == after != before
    loader.close()
    assert loader.state() == after
    assert [step.step for step in _take(loader, 2)] == [2, 3]  # a closed loader goes on where it stood


@pytest.mark.parametrize("epochs", [0.3, 1, 2, 3.5])
def test_epochs_visit_every_example_as_often(store: TokenStore, epochs: float) -> None:
    steps = _take(_loader(store, epochs=epochs), 10_000)
    seen = Counter(
        int(example) for step in steps for batch in step.micro_batches for example in batch.document_ids if example >= 0
    )
    assert sum(seen.values()) == round(EXAMPLES * epochs)
    assert max(seen.values()) - min(seen[example] for example in range(EXAMPLES)) <= 1
    counted = _count(store, 4, 8, epochs=epochs)
    assert len(steps) == counted == steps[-1].step
    # The last step is filled up with padding: its size is as ever.
    assert {sum(batch.num_tokens for batch in step.micro_batches) for step in steps} == {4 * ROW_TOKENS}


@pytest.mark.parametrize("changes", [{"epochs": 2.5}, {"mixture": MixtureSpec(exhausted="drop")}])
def test_counting_steps_leaves_the_feed_at_its_beginning(store: TokenStore, changes: dict[str, Any]) -> None:
    feed = StoreFeed(store, row_tokens=ROW_TOKENS, seed=3, **changes)
    counted = count_steps(feed, row_tokens=ROW_TOKENS, rows_per_step=4, packing_buffer=8)
    loader = PackedLoader(feed, row_tokens=ROW_TOKENS, rows_per_step=4, micro_batch_rows=2, packing_buffer=8)
    steps = _take(loader, 10_000)
    assert _digest(steps) == _digest(_take(_loader(store, **changes), 10_000))
    assert len(steps) == counted > 1


def test_the_end_stays_the_end_and_can_be_resumed(store: TokenStore) -> None:
    with _loader(store, epochs=1) as loader:
        assert sum(1 for _ in loader) > 0
        assert loader.next_step() is None and loader.next_step() is None
    again = _loader(store, epochs=1)
    again.load_state(loader.state())
    assert _take(again, 3) == []


def test_epochs_differ_and_steps_never_end(store: TokenStore) -> None:
    per_epoch = _count(store, 1, 1, epochs=1)
    steps = _take(_loader(store, rows_per_step=1, packing_buffer=1), 3 * per_epoch)
    orders = [
        [
            int(example)
            for step in part
            for batch in step.micro_batches
            for example in batch.document_ids
            if example >= 0
        ]
        for part in (steps[:per_epoch], steps[per_epoch : 2 * per_epoch])
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(EXAMPLES)) and orders[0] != orders[1]
    assert len(steps) == 3 * per_epoch


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": 4}),
        ("row_tokens", {"row_tokens": ROW_TOKENS + 1}),
        ("rows_per_step", {"rows_per_step": 8}),
        ("packing_buffer", {"packing_buffer": 9}),
    ],
)
def test_a_position_of_another_run_is_refused(store: TokenStore, name: str, change: dict[str, int]) -> None:
    state = _loader(store).state()
    with pytest.raises(CheckpointError, match=name) as caught:
        _loader(store, **change).load_state(state)
    assert str(next(iter(change.values()))) in str(caught.value)


def test_a_position_of_another_store_is_refused(store: TokenStore, tmp_path: Path) -> None:
    other = _make_store(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="store differs") as caught:
        _loader(other).load_state(_loader(store).state())
    assert store.digest in str(caught.value) and other.digest in str(caught.value)


def test_damage_found_in_the_background_surfaces(tmp_path: Path) -> None:
    _make_store(tmp_path)
    damaged = tmp_path / "shard-00001.arrow"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with _loader(TokenStore(tmp_path)) as loader:
        for _ in range(2):  # again at every call: training cannot run past it
            with pytest.raises(DataError, match=damaged.name):
                for _ in range(20):
                    loader.next_step()


def test_no_thread_is_left_behind(store: TokenStore) -> None:
    before = threading.active_count()
    with _loader(store) as loader:
        step = loader.next_step()
        assert threading.active_count() == before + 1
        assert step is not None and step.data_wait_seconds > 0
    assert threading.active_count() == before
    loader.close()


def test_what_cannot_be_trained_on_is_refused(store: TokenStore, tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "empty"):
        pass
    with TokenStoreWriter(tmp_path / "first") as writer:  # only a first token has a weight, and nothing predicts it
        writer.add(TokenizedExample(np.array([1, 2], np.int32), np.array([1, 0], np.float32), "s", "r"))
    for name in ("empty", "first"):
        with pytest.raises(DataError, match="nothing to train on"):
            _loader(TokenStore(tmp_path / name))
    with pytest.raises(DataError, match="rows:") as caught:
        _loader(store, row_tokens=8)
    assert "max_example_tokens" in str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_held_out_batches_cover_the_store_once(store: TokenStore, world: int, batch_rows: int) -> None:
    ranks = [
        list(held_out_batches(store, row_tokens=ROW_TOKENS, rank=rank, world=world, batch_rows=batch_rows))
        for rank in range(world)
    ]
    assert len({tuple(batch.num_tokens for batch in batches) for batches in ranks}) == 1
    seen = [int(e) for batches in ranks for batch in batches for e in batch.document_ids if e >= 0]
    assert sorted(seen) == list(range(EXAMPLES))
    assert sum(batch.weight for batches in ranks for batch in batches) == store.total_weight
    for batches in ranks:
        for batch in batches:
            _check_batch(store, batch)


def test_a_row_of_nothing_is_padding(store: TokenStore) -> None:
    batch = StoreFeed(store, row_tokens=ROW_TOKENS).pack(Rows.of([()]), ROW_TOKENS, 1)[0]
    assert batch.real_tokens == 0 and batch.weight == 0 and len(batch.supervised_index) == 0
    assert batch.cu_seqlens.tolist() == [0, ROW_TOKENS] and batch.document_ids.tolist() == [-1]
