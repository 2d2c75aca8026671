"""What the parts of the GPU suite share: a part's time and record, the clock, the ceilings, the documents.

A part runs in a process of its own:

    python -m tests.benchmarks.gpu.head --device cuda --seconds 60 --record head.jsonl

and adds a line of JSON per finished case, so that what was measured outlives a crash. On a CUDA device sizes are those
of training and products are bfloat16; on a CPU everything is small and float32, there to show that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: a call that is shorter is repeated until so much time has passed, so that the device never waits for the host to
#: measure the host; ms
_LEAST_MS = 4.0
#: clock cycles of the device, about 2 ms
_HEAD_START = 4_000_000
#: input sets that take turns: what a call reads is not what the last one left in the cache
ROTATED = 3
#: the spread of document lengths at which eight documents padded to the longest fill a third of their batch
SPREAD = 1.0

Cases = Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]


@dataclass
class Part:
    """One part under way. ``full``: sizes of training; else small ones. ``deadline`` is on the monotonic clock."""

    device: torch.device
    full: bool
    deadline: float
    record: Path | None = None
    cases: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Add a case to the record and print it."""
        self.cases[name] = dict(result)
        line = json.dumps({"case": name, **result})
        if self.record is not None:
            with self.record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        print(line, flush=True)

    def run(self, cases: Cases) -> None:
        """Run cases until the time is over. One that fails is kept with its error; the others go on."""
        for name, work in cases:
            if self.left() <= 0:
                self.keep(name, {"skipped": "the part's time was over"})
                continue
            begun = time.monotonic()
            try:
                result = dict(work())
            except Exception as error:
                self.keep(name, failure(error))
                if is_fatal(error):
                    raise
            else:
                self.keep(name, {**result, "seconds": round(time.monotonic() - begun, 1)})
            release(self.device)


def failure(error: BaseException) -> dict[str, Any]:
    """What is kept of an exception: its last line and where it came from."""
    trace = traceback.format_exception(error)
    return {"error": f"{type(error).__name__}: {error}"[:600], "traceback": "".join(trace)[-2500:]}


def is_fatal(error: BaseException) -> bool:
    """Whether the process can measure no more: after an illegal access every later CUDA call fails as well."""
    lost = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
    return any(text in str(error) for text in lost)


def release(device: torch.device) -> None:
    """Give freed memory back, so that one case's fragments are not the next one's."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(run: Callable[[Part], None], description: str | None) -> None:
    """The command line of a part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="no case begins after so long")
    parser.add_argument("--record", type=Path, help="file that gets a line of JSON per case")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    part = Part(device, device.type == "cuda", time.monotonic() + arguments.seconds, arguments.record)
    torch.manual_seed(0)
    run(part)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` for one shape at a time. On a CPU the graph is captured and run as it is: whether there is a
    C++ compiler is not what is tried here."""
    if device.type == "cuda":
        return torch.compile(function, dynamic=False)
    return torch.compile(function, dynamic=False, backend="eager")


Run = Callable[[int], Any]


def measure(
    part: Part, peers: Mapping[str, Run | None], *, rounds: int = 7, seconds: float = 6.0
) -> dict[str, dict[str, Any]]:
    """Median and minimum of each peer, in turns: ms, or its error.

    A peer is called with a running number, by which it picks one of its input sets; None is a peer that is not here.
    After the first three rounds no round begins once ``seconds`` are over.
    """
    clock = _timed_on_device if part.device.type == "cuda" else _timed_on_host
    found: dict[str, dict[str, Any]] = {}
    repeats: dict[str, int] = {}
    for name, run in peers.items():
        if run is None:
            found[name] = {"skipped": "not installed"}
            continue
        try:
            run(0)  # compiles, and makes handles and workspaces
            repeats[name] = min(50, max(1, round(_LEAST_MS / max(clock(run, 1, 1), 1e-3))))
        except Exception as error:
            if is_fatal(error):
                raise
            found[name] = failure(error)
            release(part.device)
    times: dict[str, list[float]] = {name: [] for name in repeats}
    begun = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - begun > seconds:
            break
        for name, values in times.items():
            run = peers[name]
            assert run is not None
            values.append(clock(run, number, repeats[name]))
    for name, values in times.items():
        found[name] = {"median_ms": significant(statistics.median(values)), "min_ms": significant(min(values))}
    return {name: found[name] for name in peers}


def _timed_on_device(run: Run, number: int, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # The device is busy until the host has launched the first calls, as it is in a step of training: else operations of
    # many short kernels would be charged with the host's start.
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    for repeat in range(repeats):
        run(number + repeat)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def _timed_on_host(run: Run, number: int, repeats: int) -> float:
    begin = time.perf_counter()
    for repeat in range(repeats):
        run(number + repeat)
    return 1e3 * (time.perf_counter() - begin) / repeats


def seconds_of(part: Part, way: Callable[[], object]) -> float:
    """Wall time of a call, with all the work that it gives the device and none from before."""
    if part.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    way()
    if part.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def significant(value: float, digits: int = 4) -> float:
    """Rounded to what the clock knows."""
    return float(f"{value:.{digits}g}")


def ratio(times: Mapping[str, Mapping[str, Any]], one: str, other: str) -> float | None:
    """``one`` over ``other``, by medians; None where one of them did not run."""
    pair = [times.get(name, {}).get("median_ms") for name in (one, other)]
    return None if None in pair else significant(pair[0] / pair[1])  # type: ignore[operator]


def ceilings(part: Part) -> dict[str, Any]:
    """What this device reaches now: a square product and a copy, on random data.

    ``gemm_tflops`` is the median of single products, ``gemm_sustained_tflops`` the mean over most of a second, in which
    a device may lower its clocks.
    """
    size, copied = (8192, 1 << 30) if part.full else (256, 1 << 20)
    left, right = (torch.randn(size, size, device=part.device).to(part.dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    times = measure(
        part, {"gemm": lambda _: torch.mm(left, right, out=out), "copy": lambda _: target.copy_(source)}, rounds=9
    )
    flops, gemm = 2.0 * size**3, times["gemm"]["median_ms"]
    clock = _timed_on_device if part.device.type == "cuda" else _timed_on_host
    long = clock(lambda _: torch.mm(left, right, out=out), 0, max(1, round((700 if part.full else 5) / gemm)))
    return {
        "gemm_size": size,
        "gemm_tflops": significant(flops / gemm / 1e9),
        "gemm_sustained_tflops": significant(flops / long / 1e9),
        "copy_gb_per_s": significant(2 * copied / times["copy"]["median_ms"] / 1e6),
        "copy_bytes": copied,
        "dtype": str(part.dtype).removeprefix("torch."),
    }


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Most memory allocated within, above what was there before: ``{"gib": ...}``; None on a CPU."""
    found: dict[str, float | None] = {"gib": None}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    torch.cuda.synchronize()
    found["gib"] = significant((torch.cuda.max_memory_allocated() - before) / 2**30)


def document_lengths(tokens: int, mean: float, cap: int, seed: int = 0) -> list[int]:
    """Log-normal lengths, at least 2 and at most ``cap``, that fill ``tokens`` exactly; the last one is cut."""
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    left = tokens
    while left > 0:
        drawn = int(np.clip(random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD), 2, cap))
        lengths.append(min(left, drawn))
        left -= lengths[-1]
    return lengths


def boundaries(lengths: list[int], device: torch.device) -> Tensor:
    """int32 [n+1]."""
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN stays NaN."""
    found, expected = found.detach().double(), expected.detach().double()
    return significant(float((found - expected).norm() / expected.norm()), 3)
