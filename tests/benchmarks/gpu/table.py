"""The results of the GPU suite as a short table:

python -m tests.benchmarks.gpu.table tests/benchmarks/results/gpu/gpu-suite.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: part -> heading -> path to the value in a case
COLUMNS: dict[str, dict[str, str]] = {
    "ceilings": {"gemm TF": "gemm_tflops", "sustained": "gemm_sustained_tflops", "copy GB/s": "copy_gb_per_s"},
    "head": {
        "ours ms": "times/ours/median_ms",
        "/whole": "ours_over_products_whole",
        "/chunked": "ours_over_products_chunked",
        "dense/ours": "dense_over_ours",
        "compiled/ours": "compiled_over_ours",
        "beyond GiB": "ours_beyond_gradients_gib",
    },
    "step": {
        "tok/s": "tokens_per_second",
        "TF": "model_tflops",
        "/gemm": "mfu_of_measured_gemm",
        "/sheet": "mfu_of_data_sheet",
        "GiB": "peak_memory_gib",
        "fill": "fill",
        "steps": "timed_steps",
    },
    "push": {
        "push ms": "median_ms/push",
        "bare ms": "median_ms/bare",
        "copy ms": "median_ms/copy",
        "GiB": "gib",
        "GiB/s": "push_gib_per_s",
    },
    "decode": {
        "ours tok/s": "tokens_per_second/ours",
        "hf tok/s": "tokens_per_second/transformers",
        "hf/ours": "transformers_over_ours",
        "ms a step": "ms_per_step",
        "device ms": "of_a_step/device_ms",
        "first s": "first_seconds/ours",
    },
    "vocabulary": {"best": "best_pad", "64/best": "default_over_best", "odd/64": "unpadded_over_default"},
    "attention": {
        "ours ms": "times/ours/median_ms",
        "per FLOP/even": "time_per_useful_flop_over_even",
        "TF": "ours_useful_tflops",
        "doc/ours": "per_document_over_ours",
        "mask/ours": "dense_mask_over_ours",
        "flex/ours": "flex_over_ours",
        "special ms": "times/special/median_ms",
        "graphs": "graphs_of_6_other_rows",
    },
    "kernels": {
        "ours ms": "times/ours/median_ms",
        "plain": "times/plain/median_ms",
        "ours comp.": "times/ours, compiled/median_ms",
        "compiled": "times/compiled/median_ms",
        "GB/s": "least_bytes_gb_per_s/ours",
        "/dense": "ours_over_dense_products",
        "hf/ours": "grouped_over_ours",
        "hf doc/ours": "transformers_over_ours",
    },
}
NAME = 44


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A block per part."""
    for part, found in result["parts"].items():
        yield f"== {part}: {found['status'] or 'done'}, {found['seconds']} s"
        if part == "tests":
            yield from _tests(found["cases"])
            continue
        columns = COLUMNS[part]
        yield f"{'':{NAME}}" + "".join(f"{heading:>14}" for heading in columns)
        for name, case in found["cases"].items():
            if name == "ceilings" and part != "ceilings":
                yield f"{'product alone, here':{NAME}}{case.get('gemm_tflops', '-'):>14} TF"
            elif "error" in case or "skipped" in case:
                yield f"{name[:NAME]:{NAME}} {case.get('error') or case['skipped']}"[:150]
            else:
                values = [_at(case, path) for path in columns.values()]
                if set(values) != {"-"}:
                    yield f"{name[:NAME]:{NAME}}" + "".join(f"{value:>14}" for value in values)
                yield from _failed_peers(case)


def _tests(cases: Mapping[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{number} {outcome}" for outcome, number in Counter(c["outcome"] for c in cases.values()).items())
    for name, case in cases.items():
        if case["outcome"] == "failed":
            yield f"  {name.rpartition('/')[2]}: {case['error']}"[:200]


def _failed_peers(case: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in case.get("times", {}).items():
        if "error" in entry:
            yield f"    {name}: {entry['error']}"[:150]


def _at(case: Mapping[str, Any], path: str) -> str:
    value: Any = case
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return "-" if value is None else str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    print("\n".join(lines(json.loads(parser.parse_args().result.read_text(encoding="utf-8")))))
