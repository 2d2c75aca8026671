"""What a device can do at best, to hold a run's FLOPs against: by its maker's data sheet, and as measured here.

The table has dense rates, without structured sparsity: where a sheet gives the rate with sparsity alone, half of it.
What a device keeps up under load is less, by power and temperature; the rate that one large product reaches in this
process says how much less, and on a CPU, which has no such sheet, it is the only peak there is.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

from posttrain_lib.ops.head_chunks import cpu_has_products_in

#: seconds that a measurement goes on, after one product to warm up
_SECONDS = {"cpu": 0.25, "cuda": 0.1}
#: rows and columns of the product that is measured
_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class DataSheet:
    """Dense peaks of a device in TFLOP/s, and where they are from. ``name``: a pattern of what CUDA calls the device.
    ``fp32``: outside tensor cores, as torch multiplies float32 unless it is told otherwise. None: not in the sheet."""

    name: str
    bf16: float
    fp16: float
    tf32: float | None
    fp8: float | None
    fp32: float
    source: str


#: the first whose pattern the device's name holds counts
DATA_SHEETS = (
    DataSheet(r"\bGB200\b", 2500, 2500, 1250, 5000, 80, "NVIDIA GB200 NVL72, specifications per superchip, halved"),
    DataSheet(r"\bB200\b", 2250, 2250, 1125, 4500, 75, "NVIDIA HGX B200, specifications of eight GPUs, divided"),
    DataSheet(r"\bH200 NVL\b", 835.5, 835.5, 417.5, 1670.5, 60, "NVIDIA H200 Tensor Core GPU data sheet, NVL"),
    DataSheet(r"\bH200\b", 989, 989, 494, 1979, 67, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    DataSheet(r"\bH100 PCIe\b", 756, 756, 378, 1513, 51, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    DataSheet(r"\bH100 NVL\b", 835, 835, 417.5, 1670.5, 60, "NVIDIA H100 Tensor Core GPU data sheet, NVL"),
    DataSheet(r"\bH100\b", 989, 989, 494, 1979, 67, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    DataSheet(r"\bA100\b", 312, 312, 156, None, 19.5, "NVIDIA A100 Tensor Core GPU data sheet"),
    DataSheet(r"\bL40S\b", 362, 362, 183, 733, 91.6, "NVIDIA L40S data sheet"),
    DataSheet(r"\bA10\b", 125, 125, 62.5, None, 31.2, "NVIDIA A10 Tensor Core GPU data sheet"),
    DataSheet(
        r"\bRTX 4090$", 165.2, 165.2, 82.6, 330.3, 82.6, "NVIDIA Ada GPU architecture white paper, sums in float32"
    ),
    DataSheet(r"\bMI300X\b", 1307.4, 1307.4, 653.7, 2614.9, 163.4, "AMD Instinct MI300X data sheet"),
)


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of one device in a precision: by its data sheet (None where there is none), and measured."""

    sheet: float | None
    measured: float
    source: str

    @classmethod
    def of(cls, device: torch.device, precision: str) -> Peaks:
        """Of a device; ``precision`` as ``train.precision`` has it."""
        sheet = sheet_of(device)
        return cls(
            sheet_peak(device, precision),
            measured_peak(device, precision),
            "measured" if sheet is None else sheet.source,
        )

    @property
    def best(self) -> float:
        """What MFU is a share of: the data sheet's where there is one, else what was measured."""
        return self.measured if self.sheet is None else self.sheet


def sheet_of(device: torch.device) -> DataSheet | None:
    """The data sheet of a device; None for CPUs and for GPUs that the table does not have."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((sheet for sheet in DATA_SHEETS if re.search(sheet.name, name)), None)


def sheet_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s by the data sheet; None where none is known.

    Args:
        precision: "bf16", "fp16", "fp8", or "fp32", which is TF32's where torch multiplies float32 in it.
    """
    sheet = sheet_of(device)
    if sheet is None:
        return None
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        precision = "tf32"
    rate = getattr(sheet, precision)
    return None if rate is None else rate * 1e12


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of one large product of random numbers in this process, its threads and the precision of a run's products;
    the best of a quarter of a second on a CPU, of a tenth on a GPU. Once per process, device, precision and threads.

    Random numbers, for a GPU draws less power over zeros and then clocks higher. Where a CPU has no products in half
    precision, those of float32 are what half precision comes to.
    """
    return _measured(device.type, device.index, product_type(device, precision), torch.get_num_threads())


def product_type(device: torch.device, precision: str) -> torch.dtype:
    """The dtype that a run's products are fastest in."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return dtype if device.type != "cpu" or cpu_has_products_in(dtype) else torch.float32


@cache
def _measured(kind: str, index: int | None, dtype: torch.dtype, threads: int) -> float:
    device = torch.device(kind if index is None else f"{kind}:{index}")
    size = _SIZE.get(kind, _SIZE["cpu"])
    generator = torch.Generator(device).manual_seed(0)  # not the run's own
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    torch.mm(left, right, out=out)
    wait()
    best, end = float("inf"), time.perf_counter() + _SECONDS.get(kind, _SECONDS["cpu"])
    while time.perf_counter() < end:
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        wait()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
