from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain_lib.ops import head_chunks
from posttrain_lib.ops.head_chunks import ChunkedHead
from posttrain_lib.ops.output_head import OutputHead
from tests.support.triton_compilation import compiled_texts

CASES = Path(__file__).with_name("head_triton_cases.py")
ROOT = CASES.parents[3]


def test_the_kernels_under_the_interpreter() -> None:
    """All of ``head_triton_cases``: the interpreter is chosen for a whole process."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout


COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from posttrain_lib.ops import head_triton

ROW = {"stride": "i32", "targets": "*i64", "columns": "i32", "entries": "i32", "inner": "fp32", "outer": "fp32"}
KERNELS = {
    "statistics": (head_triton._statistics_kernel, {"log_totals": 1, "logprobs": 1, "entropies": 1}),
    "gradient": (head_triton._gradient_kernel, {"log_totals": 1, "pulls": 1, "entropies": 1, "entropy_pulls": 1}),
}


def text_of(name, dtype, constants, sizes):
    kernel, pointers = KERNELS[name]
    types = {"products": f"*{dtype}", **ROW, **{pointer: "*fp32" for pointer in pointers}}
    names = kernel.arg_names
    constants = {key: value for key, value in constants.items() if key in names}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # the launcher says the same where it sees it: addresses and sizes that are multiples of 16
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sizes},
    )
    options = {"num_warps": head_triton.WARPS}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


tile = {"DEEP": head_triton.DEEP, "LANES": head_triton.LANES}
flags = {"CAPPED": True, "ENTROPY": True, "BLOCK": head_triton.BLOCK, **tile}
wide = ["products", "stride", "targets", "columns"]
print(json.dumps({
    "statistics": text_of("statistics", "bf16", {**flags, "GRADIENT": True}, wide),
    "gradient": text_of("gradient", "bf16", flags, wide),
    "odd": text_of("statistics", "fp32", {**flags, "GRADIENT": True}, ["products", "targets"]),
}))
"""


def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Without one: the interpreter runs what the compiler refuses, and says nothing of what it makes of it."""
    pytest.importorskip("triton")
    for name, text in compiled_texts(COMPILE, tmp_path).items():
        moves = re.findall(r"(ld|st)\.global\.\S*v4\.b32", text)
        assert set(moves) == (set() if name == "odd" else {"ld", "st"}), name


@pytest.mark.parametrize(
    ("count", "weight_gradient", "rows"),
    [
        # one chunk for as many rows as the sum in float32, which it does without, would take
        (4096, True, 4096 + 512),
        (4608, True, 4096 + 512),
        (4608, False, 2304),
        # else chunks of about one size, in steps of 128
        (4609, True, 2432),
        (16384, True, 4096),
        (9000, True, 3072),
        (100, False, 128),
        (0, True, 4096 + 512),
    ],
)
def test_rows_of_a_chunk(count: int, weight_gradient: bool, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(head_chunks, "has_kernels", lambda _: True)
    monkeypatch.setattr(head_chunks, "cpu_has_products_in", lambda _: True)
    monkeypatch.setattr(head_chunks, "_CHUNK_ROWS", {})
    monkeypatch.setattr(head_chunks, "_CHUNK_BYTES", {})
    hidden = torch.zeros(1, 512, dtype=torch.bfloat16)
    head = OutputHead(torch.zeros(1000, 512, dtype=torch.bfloat16))
    index = torch.zeros(count, dtype=torch.int64)
    chunked = ChunkedHead(head, hidden, index, weight_gradient=weight_gradient)
    assert chunked.chunk_rows == rows
    sizes = [chunk.stop - chunk.start for chunk in chunked.chunks()]
    assert sum(sizes) == count
    # a wider weight is summed as wide, and has no room to give
    head = OutputHead(torch.zeros(1000, 512))
    assert ChunkedHead(head, hidden, index, weight_gradient=True).chunk_rows <= 4096


def test_float64_and_a_cpu_take_no_kernels() -> None:
    assert not head_chunks.has_kernels("cpu")
    head = OutputHead(torch.zeros(8, 4))
    assert not ChunkedHead(head, torch.zeros(2, 4), torch.arange(2)).kernels
