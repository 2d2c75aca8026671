"""Cutting a packed batch over context ranks: the parts are the batch, every piece finds the keys of its document."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.families import spec_from_config, spec_from_folder
from posttrain_lib.parallel.context import apply_context_parallel, check_context, cut_batch, own_part
from posttrain_lib.parallel.mesh import RankMesh
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from posttrain_lib.training.flops import batch_flops, causal_pairs
from tests.oracles.prefix_tree import documents, tree_of
from tests.oracles.tiny_job import HF_CONFIG
from tests.support.packed_batch import batch_of, plain

CHOICES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=12)


def cut(batch: PackedBatch, degree: int) -> list[PackedBatch]:
    return [cut_batch(batch, degree, rank) for rank in range(degree)]


def pools(parts: Sequence[PackedBatch]) -> list[np.ndarray]:
    """What lies behind each rank's ``key_index``: its token ids, then those that the others send, without a network."""
    exchanges = [part.prefixes.exchange for part in parts if part.prefixes is not None]
    found = []
    for rank, part in enumerate(parts):
        pool = [part.token_ids]
        for other, (sender, exchange) in enumerate(zip(parts, exchanges, strict=True)):
            begin = sum(exchange.sent[:rank])
            rows = sender.token_ids[exchange.send_index[begin : begin + exchange.sent[rank]]]
            assert len(rows) == exchanges[rank].received[other]
            pool.append(rows)
        assert exchanges[rank].sent[rank] == 0
        found.append(np.concatenate(pool))
    return found


@given(CHOICES, st.integers(2, 4), st.integers(0, 40))
def test_the_parts_are_the_batch_and_find_the_keys_of_their_documents(
    choices: list[tuple[int, int, int]], degree: int, room: int
) -> None:
    tree = tree_of(choices, depth=5)
    used, each = sum(length for _, _, length in tree), 2 * degree
    batch = batch_of(tree, -(-(used + room) // each) * each)
    parts = cut(batch, degree)
    assert {part.num_tokens for part in parts} == {batch.num_tokens // degree}
    every = np.concatenate([part.token_ids for part in parts])
    assert sorted(every.tolist()) == list(range(batch.num_tokens))
    for name in ("target_ids", "loss_weights", "positions"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name)[every])
    assert sum(part.real_tokens for part in parts) == batch.real_tokens
    assert sum(part.weight for part in parts) == batch.weight
    paths = documents(tree)
    for part, pool in zip(parts, pools(parts), strict=True):
        assert part.prefixes is not None
        assert part.supervised_index.tolist() == np.flatnonzero(part.loss_weights).tolist()
        keys = np.split(pool[part.prefixes.key_index], part.prefixes.cu_seqlens_k[1:-1])
        own = np.split(part.token_ids, part.cu_seqlens[1:-1])
        assert part.prefixes.key_lengths == tuple(map(len, keys))
        assert part.max_seqlen == max(map(len, own))
        for document, source, tokens, seen in zip(part.document_ids, part.document_sources, own, keys, strict=True):
            if document < 0:  # padding sees its own piece: nothing of it is sent
                assert source == -1 and seen.tolist() == tokens.tolist()
                continue
            assert source == document % 3
            path = paths[document]
            assert seen.tolist() == path[: path.index(tokens[-1]) + 1]
            assert seen[-len(tokens) :].tolist() == tokens.tolist()


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_a_document_as_long_as_the_row_is_cut_in_a_zigzag(degree: int) -> None:
    size = 10
    batch = batch_of(plain(2 * degree * size))
    for rank, part in enumerate(cut(batch, degree)):
        chunks = sorted({int(token) // size for token in part.token_ids})
        assert chunks == [rank, 2 * degree - 1 - rank]
        assert (part.positions.astype(float) + 1).sum() == pytest.approx(
            (batch.positions.astype(float) + 1).sum() / degree
        )


def test_pairs_are_even_where_a_row_is_half_one_document() -> None:
    batch = batch_of(plain(512, *[8] * 64))
    for degree in (2, 4):
        pairs = [(part.positions.astype(float) + 1).sum() for part in cut(batch, degree)]
        assert max(pairs) / np.mean(pairs) < 1.06


def test_documents_that_no_cut_parts_exchange_nothing() -> None:
    parts = cut(batch_of(plain(*[8] * 8)), 2)
    for part in parts:
        assert part.prefixes is not None and not part.prefixes.exchange.travels
        assert not part.prefixes.shares  # the path of whole documents
        assert part.prefixes.exchange.sent == part.prefixes.exchange.received == (0, 0)


def test_no_more_travels_than_is_seen() -> None:
    # Chunks of 4: one rank has the first and the last, and needs the two between; the other needs the first alone.
    first, second = (part.prefixes for part in cut(batch_of(plain(16)), 2))
    assert first is not None and second is not None
    assert (first.exchange.sent, first.exchange.received) == ((0, 4), (0, 8))
    assert (second.exchange.sent, second.exchange.received) == ((8, 0), (4, 0))


def test_the_work_of_the_parts_is_the_batch_s() -> None:
    spec = spec_from_config(HF_CONFIG)
    batch = batch_of(tree_of([(0, 0, 30), (1, 20, 9), (0, 0, 5)]), 48)
    found = sum(batch_flops(spec, part) for part in cut(batch, 4))
    assert found == pytest.approx(batch_flops(spec, batch))
    assert causal_pairs(np.array([4]), None) > 0  # or the line above would hold of nothing


def test_one_context_rank_keeps_the_batch() -> None:
    batch = batch_of(plain(7))
    assert own_part(batch, RankMesh(SINGLE, torch.device("cpu"))) is batch


def test_a_part_goes_through_map_and_loses_its_prefixes_with_nothing() -> None:
    part = cut(batch_of(plain(16)), 2)[0]
    doubled = part.map(lambda array: array * 2)
    assert doubled.prefixes is not None and part.prefixes is not None
    assert doubled.prefixes.exchange.send_index.tolist() == (part.prefixes.exchange.send_index * 2).tolist()
    assert doubled.parents is None
    assert dataclasses.replace(part, real_tokens=0).prefixes is part.prefixes


def test_what_cannot_be_cut_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="multiple of 2 x 4 context ranks"):
        cut_batch(batch_of(plain(12)), 4, 0)
    config = spec_from_config(HF_CONFIG).config
    check_context(config, 1, row_tokens=33, longest=20)
    check_context(config, 4, row_tokens=32, longest=20)
    with pytest.raises(ConfigError, match=r"train\.row_tokens: 40") as refused:
        check_context(config, 4, row_tokens=33, longest=20)
    assert refused.value.where == "train.row_tokens"


def test_longrope_is_refused_where_documents_cross_its_bound(family_folder: Callable[[str], Path]) -> None:
    config = spec_from_folder(family_folder("phi3, longrope")).config
    check_context(config, 2, row_tokens=64, longest=48)
    with pytest.raises(ConfigError, match=r"data\.max_example_tokens: 48"):
        check_context(config, 2, row_tokens=64, longest=49)


def test_linear_attention_is_refused_before_and_with_the_model(family_folder: Callable[[str], Path]) -> None:
    config = spec_from_folder(family_folder("qwen3_next")).config
    with pytest.raises(ConfigError, match="linear attention"):
        check_context(config, 2, row_tokens=64, longest=48)
    mesh = RankMesh(MeshSpec(context=2), torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(config)
    with pytest.raises(ConfigError, match="linear attention"):
        apply_context_parallel(model, mesh)


def test_a_run_file_whose_rows_cannot_be_cut_is_refused() -> None:
    sections = {
        "name": "test",
        "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 20},
        "model": {"path": "folder"},
        "train": {"steps": 10, "row_tokens": 66},
        "compute": {"devices_per_node": 2, "mesh": {"context": 2}},
    }
    with pytest.raises(
        ConfigError, match=r"train\.row_tokens \(66\) is not a multiple of 2 x compute\.mesh\.context \(4\)"
    ):
        build_run_config(sections)
    assert build_run_config(sections, overrides=["train.row_tokens=64"]).compute.mesh_spec() == MeshSpec(context=2)
