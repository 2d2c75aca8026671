from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain_lib.ops.fused import fuses
from tests.support.triton_compilation import compiled_texts

CASES = Path(__file__).with_name("elementwise_triton_cases.py")
ROOT = CASES.parents[3]


def test_a_cpu_takes_no_kernels() -> None:
    assert not fuses(torch.zeros(2))


def test_the_kernels_under_the_interpreter() -> None:
    """All of ``elementwise_triton_cases``: the interpreter is chosen for a whole process."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout


COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from posttrain_lib.ops import norm_triton, rope_triton, swiglu_triton

NUMBERS = {"eps": "fp32", "one_of_columns": "fp32", "count": "i32"}
FLOATS = ("inverses", "sums", "cosines", "sines")


def text_of(kernel, dtype, pointers, constants, odd=(), **options):
    names = kernel.arg_names
    types = {name: f"*{'fp32' if name in FLOATS else dtype}" for name in pointers}
    types = {name: types.get(name) or NUMBERS.get(name, "i32") for name in names if name not in constants}
    even = [name for name in types if name not in ("eps", "one_of_columns", "group", "grad_group", *odd)]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # the launcher says the same where it sees it: addresses and sizes that are multiples of 16
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


found = {}
for columns in (128, 1024, 16384):
    block = norm_triton._block(columns)
    warps = block.pop("num_warps")
    late = columns == 1024
    # a group of 1 becomes a constant in the launcher
    found[f"norm {columns}"] = text_of(
        norm_triton._forward_kernel, "bf16", ["hidden", "weight", "out", "inverses"],
        {"PLUS_ONE": late, "LATE": late, **block, **({"group": 1} if late else {})}, num_warps=warps,
    )
    found[f"norm backward {columns}"] = text_of(
        norm_triton._backward_kernel, "fp32", ["hidden", "grads", "weight", "inverses", "grad_hidden", "sums"],
        {"PLUS_ONE": False, "WEIGHT": True, **block}, num_warps=warps,
    )
for interleaved in (False, True):
    found[f"rope {interleaved}"] = text_of(
        rope_triton._turn_kernel, "bf16", ["heads", "out", "cosines", "sines"],
        {"INTERLEAVED": interleaved, "BACK": True, "TOKENS": 1, "HEADS": 16, "PAIRS": 64, "REST": 64},
        num_warps=rope_triton._WARPS, enable_fp_fusion=False,
    )
for activation in ("silu", "gelu_tanh", "gelu"):
    options = {"ACTIVATION": activation, "BLOCK": swiglu_triton._BLOCK}
    found[activation] = text_of(
        swiglu_triton._forward_kernel, "bf16", ["gates", "ups", "out"], options, num_warps=swiglu_triton._WARPS
    )
    found[f"{activation} backward"] = text_of(
        swiglu_triton._backward_kernel, "bf16", ["gates", "ups", "grads", "grad_gates", "grad_ups"], options,
        num_warps=swiglu_triton._WARPS,
    )
print(json.dumps(found))
"""


def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Without one: the interpreter runs what the compiler refuses, and says nothing of what it makes of it."""
    pytest.importorskip("triton")
    for name, text in compiled_texts(COMPILE, tmp_path).items():
        assert set(re.findall(r"(ld|st)\.global\.\S*v4\.b32", text)) == {"ld", "st"}, name
        if name.startswith("rope"):
            assert "fma.rn.f32" not in text, name
