"""FLOPs of packed rows: documents, shared beginnings, windows and padding; families are in test_flop_graph.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.perplexity import with_signals
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import pack
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.training.flops import FlopCount, batch_flops, causal_pairs
from tests.oracles.prefix_tree import TREE, Segment, row_of, seen
from tests.oracles.tiny_job import HF_CONFIG, pack_rows, write_model, write_store
from tests.support.pair_jobs import write_pairs


def test_agrees_with_torchs_counter(tmp_path: Path) -> None:
    spec = spec_from_folder(write_model(tmp_path / "model"))
    store = TokenStore(write_store(tmp_path / "train", 40, seed=1))
    rows: list[tuple[int, ...]] = [(3,), (5,), (7,)]
    # rows exactly as long as their document: torch counts padding, we do not
    batches = [pack_rows(store, [row], int(store.lengths[row[0]])) for row in rows]
    model = build_model(spec)
    init_weights(model, spec, seed=0)
    # the plain kernel, whose products torch counts on a CPU; it counts none of the fused one's
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            build_loss("sft")(model, to_torch(batch)).local_sum.backward()

    squares = sum(float(store.lengths[row[0]]) ** 2 for row in rows)
    layers, heads, size = (HF_CONFIG[k] for k in ("num_hidden_layers", "num_attention_heads", "head_dim"))
    attention = 6 * layers * heads * size * squares
    # torch's plain attention computes the whole square, of which the causal half is needed
    assert counter.get_total_flops() == sum(batch_flops(spec, batch) for batch in batches) + attention


def test_shared_beginnings_count_once_as_torch_counts_them(tmp_path: Path) -> None:
    spec = spec_from_folder(write_model(tmp_path / "model"))
    batch = _tree_batch(TREE, padding=0)
    model = build_model(spec)
    init_weights(model, spec, seed=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        build_loss("sft")(model, to_torch(batch)).local_sum.backward()
    layers, heads, size = (HF_CONFIG[k] for k in ("num_hidden_layers", "num_attention_heads", "head_dim"))
    # the plain kernel again computes the whole square of a segment's own tokens, and its context as we count it
    unused = 6 * layers * heads * size * sum(length**2 for _, _, length in TREE)
    assert counter.get_total_flops() == batch_flops(spec, batch) + unused


@pytest.mark.parametrize("window", [None, 1, 4, 11, 100])
def test_pairs_of_a_tree_are_those_of_its_documents_less_the_shared(window: int | None) -> None:
    contexts, lengths = (np.array([item[place] for item in TREE]) for place in (1, 2))
    shared = causal_pairs(lengths, window, contexts)
    assert shared == causal_pairs(contexts + lengths, window) - causal_pairs(contexts, window)
    # the table of all pairs, of which the custom leaves half of each token's sight of itself; a window cuts the rest
    exact = int(seen(TREE, window).sum())
    assert abs(exact - shared) <= lengths.sum() / 2
    if window is None:
        assert shared == float((lengths * contexts + lengths**2 / 2).sum())


def test_padding_of_a_row_with_shared_beginnings_costs_nothing(tmp_path: Path) -> None:
    spec = spec_from_folder(write_model(tmp_path / "model"))
    assert batch_flops(spec, _tree_batch(TREE, padding=9)) == batch_flops(spec, _tree_batch(TREE, padding=0))


def _tree_batch(tree: Sequence[Segment], padding: int) -> PackedBatch:
    """Random tokens, a third of them trained, and a last segment of padding."""
    segments = [*tree, *([(-1, 0, padding)] if padding else [])]
    cu_seqlens, positions, parents = (tensor.numpy() for tensor in row_of(segments))
    real = sum(length for _, _, length in tree)
    weights = np.where((np.arange(len(positions)) % 3 == 0) & (np.arange(len(positions)) < real), 1, 0)
    ids = np.random.default_rng(0).integers(0, HF_CONFIG["vocab_size"], len(positions))
    return PackedBatch(
        token_ids=ids,
        target_ids=ids,
        loss_weights=weights.astype(np.float32),
        positions=positions,
        cu_seqlens=cu_seqlens,
        supervised_index=np.flatnonzero(weights),
        document_sources=np.zeros(len(segments), np.int32),
        document_ids=np.where(np.arange(len(segments)) < len(tree), np.arange(len(segments)), -1),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        real_tokens=real,
        parents=parents,
    )


def _in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", ["distill", "dpo"])
def test_a_frozen_model_beside_is_counted_apart_as_torch_counts_it(name: str, tmp_path: Path) -> None:
    wider = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    folders = write_model(tmp_path / "model"), write_model(tmp_path / "frozen", **wider)
    specs, (model, frozen) = [spec_from_folder(folder) for folder in folders], map(load_model, folders)
    model.requires_grad_(True)
    loss = build_loss(name)
    loss.attach(Beside(frozen))
    store = TokenStore((write_pairs if name == "dpo" else write_store)(tmp_path / "store", 1, seed=1))
    # exactly as long as its documents: torch counts padding, we do not
    (batch,) = pack(store, [(0,)], 1, row_tokens=int(store.lengths.sum()))
    flops = FlopCount.of(specs[0]).batch(batch) + FlopCount.of_frozen(specs[1]).batch(batch)
    own = {torch.ops.aten.addmm_: _in_place}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, to_torch(with_signals(batch, loss, "train"))).local_sum.backward()
    # the head of a loss that goes on with log-probs forms logits again for the gradient
    head = 2 * specs[0].config.vocab_size * specs[0].config.hidden_size * len(batch.supervised_index)
    width = HF_CONFIG["num_attention_heads"] * HF_CONFIG["head_dim"] * float((store.lengths.astype(float) ** 2).sum())
    unused = (6 * 2 + 2 * 3) * width  # halves of squares: forward and backward of two layers, forward of three
    assert counter.get_total_flops() == flops.model + flops.frozen + unused + (head if name == "dpo" else 0)
    assert flops.hardware == flops.model + flops.frozen and flops.recomputed == 0 < flops.frozen
    assert flops.model == batch_flops(specs[0], batch)


def test_pairs_of_a_window() -> None:
    lengths = np.array([3, 10])
    assert causal_pairs(lengths, None) == (9 + 100) / 2
    assert causal_pairs(lengths, 10) == causal_pairs(lengths, None)
    assert causal_pairs(lengths, 4) == 9 / 2 + (16 / 2 + 6 * 4)


def test_padding_costs_nothing(tmp_path: Path) -> None:
    spec = spec_from_folder(write_model(tmp_path / "model"))
    store = TokenStore(write_store(tmp_path / "train", 10, seed=1))
    assert batch_flops(spec, pack_rows(store, [(1, 2)], 64)) == batch_flops(spec, pack_rows(store, [(1, 2), ()], 128))
