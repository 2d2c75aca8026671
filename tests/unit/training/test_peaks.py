"""Peaks: which data sheet a device's name means, and what a CPU is measured at."""

from __future__ import annotations

import pytest
import torch

from posttrain_lib.training import peaks
from posttrain_lib.training.peaks import DATA_SHEETS, Peaks, measured_peak, product_type, sheet_peak


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "fp16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp8", None),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),  # another device, another rate
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("GeForce", "bf16", None),
    ],
)
def test_a_name_means_a_data_sheet(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float) -> None:
    monkeypatch.setattr(peaks.torch.cuda, "get_device_name", lambda _: name)
    assert sheet_peak(torch.device("cuda", 0), precision) == peak


def test_float32_is_tf32_where_torch_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks.torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert sheet_peak(torch.device("cuda", 0), "fp32") == 494e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("sheet", DATA_SHEETS, ids=lambda sheet: sheet.name)
def test_rates_of_a_sheet_are_dense_and_fit_each_other(sheet: peaks.DataSheet) -> None:
    """Half precision is twice TF32 and half of fp8 on every device here, so that a rate with sparsity stands out."""
    assert sheet.source
    assert sheet.bf16 == sheet.fp16
    assert sheet.tf32 is not None
    assert sheet.bf16 / sheet.tf32 == pytest.approx(2, rel=0.02)  # sheets round
    if sheet.fp8 is not None:
        assert sheet.fp8 / sheet.bf16 == pytest.approx(2, rel=0.03)


def test_a_cpu_is_measured_once_and_leaves_the_runs_random_numbers_alone() -> None:
    cpu = torch.device("cpu")
    assert sheet_peak(cpu, "fp32") is None
    before = torch.get_rng_state()
    found = Peaks.of(cpu, "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.best == found.measured == measured_peak(cpu, "fp32")
    assert found.source == "measured"
    # no core multiplies fewer than 0.1 or more than 1000 GFLOP/s a thread
    assert 1e8 < found.measured < 1e12 * torch.get_num_threads()
    assert peaks._measured.cache_info().hits > 0


def test_half_precision_on_a_cpu_without_it_is_float32s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "cpu_has_products_in", lambda dtype: dtype == torch.float32)
    assert product_type(torch.device("cpu"), "bf16") == torch.float32
    assert product_type(torch.device("cuda"), "bf16") == torch.bfloat16
