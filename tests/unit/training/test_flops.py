"""The FLOP count against torch's counter, and the peaks it is held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.loader import pack_rows
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.losses import build_loss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.training import flops
from posttrain_lib.training.flops import batch_flops, causal_pairs, peak_flops
from tests.oracles.tiny_job import HF_CONFIG, write_model, write_store


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


def test_pairs_of_a_window() -> None:
    lengths = np.array([3, 10])
    assert causal_pairs(lengths, None) == (9 + 100) / 2
    assert causal_pairs(lengths, 10) == causal_pairs(lengths, None)
    assert causal_pairs(lengths, 4) == 9 / 2 + (16 / 2 + 6 * 4)


def test_padding_costs_nothing(tmp_path: Path) -> None:
    spec = spec_from_folder(write_model(tmp_path / "model"))
    store = TokenStore(write_store(tmp_path / "train", 10, seed=1))
    assert batch_flops(spec, pack_rows(store, [(1, 2)], 64)) == batch_flops(spec, pack_rows(store, [(1, 2), ()], 128))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H200", "fp32", None),
        ("GeForce", "bf16", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None) -> None:
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None
