"""The packed training step: effective tokens/s, exact MFU and memory, beside a plain transformers loop.

Documents are log-normal of mean 487, at most 4,096 tokens. Only tokens of documents count, whatever a system computes;
FLOPs are those that the model needs for them (``training.flops``), for every system alike, so a system's MFU falls with
its padding and with logits that no target asks for. No activation is recomputed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.parallel.compilation import compile_blocks
from posttrain_lib.training.device import peak_memory_gib
from posttrain_lib.training.flops import batch_flops
from posttrain_lib.training.peaks import sheet_peak
from tests.benchmarks.gpu.common import Cases, Part, ceilings, document_lengths, failure, main, release, significant
from tests.benchmarks.gpu.documents import BUFFER, documents_of, packed_rows
from tests.benchmarks.gpu.systems import (
    Step,
    as_in_training,
    hf_weights,
    own_model,
    own_step,
    packed_micro_batches,
    padded_micro_batches,
    peer_model,
    peer_step,
    precision_on,
)

MEAN, LONGEST, PAD_TO = 487, 4096, 64
#: different steps that take turns
STEPS = 2
#: documents before those of a step, in buffers of the packer
STREAM = 8
#: seconds without which compiled blocks are not begun
COMPILATION = 40
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def qwen3(hidden: int, forward: int, layers: int, heads: int, vocabulary: int = 151936) -> dict[str, Any]:
    """config.json of a small Qwen3."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
        "use_sliding_window": False,
    }


LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": _LLAMA3,
    "attention_bias": False,
    "mlp_bias": False,
}
MODELS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
    "Llama-3.2-1B": LLAMA_1B,
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16),
}
SMALL = {"small Qwen3": qwen3(64, 96, 2, 2, vocabulary=515)}


class Workload:
    """A model's shape and the documents of a few steps."""

    def __init__(
        self, part: Part, config: dict[str, Any], row_tokens: int, step_tokens: int, share: float = 1.0
    ) -> None:
        self.part, self.config, self.row_tokens = part, config, row_tokens
        self.spec: ModelSpec = with_padded_vocabulary(spec_from_config(config), PAD_TO)
        mean, longest = min(MEAN, row_tokens / 4), min(LONGEST, row_tokens)
        self.documents, self.rows = [], []
        for seed in range(STEPS):
            # far more than a step takes: what a packer makes of a stream, not of its beginning
            lengths = document_lengths(step_tokens + round(STREAM * BUFFER * mean), mean, longest, seed)
            drawn = documents_of(lengths, config["vocab_size"], seed)
            rows = packed_rows(drawn, row_tokens, step_tokens // row_tokens, share)
            self.rows.append(rows)
            used = sorted(int(number) for row in rows for number in row.document_ids if number >= 0)
            self.documents.append([drawn[number] for number in used])

    def facts(self) -> dict[str, Any]:
        """What a step is made of."""
        lengths = [len(document) for documents in self.documents for document in documents]
        slots = sum(len(rows) for rows in self.rows) * self.row_tokens
        return {
            "row_tokens": self.row_tokens,
            "rows_per_step": [len(rows) for rows in self.rows],
            "documents_per_step": [len(documents) for documents in self.documents],
            "mean_document": significant(statistics.mean(lengths)),
            "fill": significant(sum(lengths) / slots),
            "parameters": sum(int(np.prod(shape)) for shape in self.spec.parameter_shapes().values()),
        }

    def tokens(self, number: int) -> int:
        """Of the documents of a step."""
        return sum(len(document) for document in self.documents[number % STEPS])

    def flops(self, number: int) -> float:
        """That the model needs for a step."""
        return sum(batch_flops(self.spec, row) for row in self.rows[number % STEPS])


def timed(part: Part, work: Workload, step: Step, gemm_tflops: float, *, seconds: float) -> dict[str, Any]:
    """Run a step until ``seconds`` are over: 3 to warm up and 10 to count at most, at least one of each."""
    cuda = part.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun, losses, times, numbers = time.monotonic(), [], [], []
    warm_ups, steps = (3, 13) if part.full else (1, 2)
    for number in range(steps):
        spent = time.monotonic() - begun
        if times and spent > seconds:
            break
        start = time.perf_counter()
        losses.append(step(number))
        if cuda:
            torch.cuda.synchronize()
        if number > 0 and (number >= warm_ups or spent > seconds / 3):
            times.append(time.perf_counter() - start)
            numbers.append(number)
    rates = [work.tokens(number) / each for number, each in zip(numbers, times, strict=True)]
    flops = [work.flops(number) / each / 1e12 for number, each in zip(numbers, times, strict=True)]
    reached = statistics.median(flops)
    peak = sheet_peak(part.device, precision_on(part.device))
    return {
        "timed_steps": len(times),
        "step_seconds": significant(statistics.median(times)),
        "tokens_per_second": significant(statistics.median(rates)),
        "model_tflops": significant(reached),
        "mfu_of_measured_gemm": significant(reached / gemm_tflops),
        "mfu_of_data_sheet": None if peak is None else significant(reached * 1e12 / peak),
        "peak_memory_gib": significant(peak_memory_gib(part.device)),
        "losses": [significant(loss, 7) for loss in losses[:STEPS]],
    }


def profile(part: Part, step: Step) -> dict[str, Any]:
    """Where the device's time goes in one step: the kernels that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = part.device.type == "cuda"
    begun = time.perf_counter()
    try:
        with profiler(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
            step(0)
    except RuntimeError as error:  # not every machine lets a profiler in; the times above stand without it
        return failure(error)
    wall = time.perf_counter() - begun
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    return {
        "wall_ms_under_profiler": significant(1e3 * wall),
        "busy_ms": significant(sum(getattr(event, key) for event in events) / 1e3),
        "launches": sum(event.count for event in events),
        "kernels": [
            {"name": event.key[:110], "ms": significant(getattr(event, key) / 1e3, 3), "calls": event.count}
            for event in events[:25]
        ],
    }


class Systems:
    """The systems that train one model, each from the same weights."""

    def __init__(self, part: Part, gemm_tflops: float, config: dict[str, Any], row_tokens: int) -> None:
        self.part, self.gemm_tflops, self.config = part, gemm_tflops, config
        self.row_tokens, self.step_tokens = row_tokens, (65536 if part.full else 512)
        self.seconds = 9.0 if part.full else 2.0

    def own(
        self,
        *,
        share: float = 1.0,
        deterministic: bool = True,
        with_profile: bool = False,
        prepare: Callable[[Decoder], None] | None = None,
    ) -> Mapping[str, Any]:
        """This project's step; ``prepare`` changes the model before it trains."""
        part = self.part
        work = Workload(part, self.config, self.row_tokens, self.step_tokens, share)
        with as_in_training(part.device, deterministic):
            model = own_model(work.spec, part.device)
            if prepare is not None:
                prepare(model)
            step = own_step(model, work.rows, part.device)
            begun = time.perf_counter()
            for number in range(STEPS if prepare is not None else 0):  # what compiles does so outside of the clock
                step(number)
            prepared = significant(time.perf_counter() - begun)
            result = timed(part, work, step, self.gemm_tflops, seconds=self.seconds)
            facts = {**work.facts(), **({"first_steps_seconds": prepared} if prepare is not None else {})}
            return {**facts, **result, **({"profile": profile(part, step)} if with_profile else {})}

    def padded(self, batch: int) -> Mapping[str, Any]:
        """transformers' class on padded batches of so many documents."""
        work = Workload(self.part, self.config, self.row_tokens, self.step_tokens)
        steps = [padded_micro_batches(documents, batch, self.part.device) for documents in work.documents]
        return {"batch": batch, **self._peer(work, steps, "sdpa")}

    def packed(self, attention: str, row_tokens: int) -> Mapping[str, Any]:
        """transformers' class on packed rows, by its own way to keep documents apart."""
        work = Workload(self.part, self.config, row_tokens, self.step_tokens)
        steps = [packed_micro_batches(rows, self.part.device) for rows in work.rows]
        return {**work.facts(), **self._peer(work, steps, attention)}

    def _peer(self, work: Workload, steps: Sequence[Any], attention: str) -> dict[str, Any]:
        device = self.part.device
        weights = hf_weights(work.spec, own_model(work.spec, device))
        release(device)
        step = peer_step(peer_model(self.config, weights, attention, device), steps, device)
        return timed(self.part, work, step, self.gemm_tflops, seconds=self.seconds)

    def either(self, *attempts: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The first attempt that fits into memory."""
        failed = []
        for attempt in attempts:
            try:
                return {**attempt(), **({"before": failed} if failed else {})}
            except torch.OutOfMemoryError as error:
                failed.append(str(error)[:200])
            release(self.part.device)
        return {"error": "out of memory", "before": failed}


def model_cases(part: Part, gemm_tflops: float) -> Cases:
    """This project's step first, then its peers, then what changes if something is left out."""
    rows = 16384 if part.full else 128
    names = list(MODELS)[:2] if part.full else list(SMALL)
    every = {name: Systems(part, gemm_tflops, (MODELS | SMALL)[name], rows) for name in names}
    first = every[names[0]]
    for name, systems in every.items():
        yield f"{name}: own", lambda systems=systems: systems.own(with_profile=True)
    yield from compiled_case(part, names[0], first)
    yield from peer_cases(names[0], first)
    for name in names[1:]:
        yield from compiled_case(part, name, every[name])
    if part.full:
        larger = Systems(part, gemm_tflops, MODELS["Qwen3-1.7B"], 8192)
        yield "Qwen3-1.7B: own", larger.own
        yield from compiled_case(part, "Qwen3-1.7B", larger)
    for name in names[1:]:
        yield from peer_cases(name, every[name])
    yield f"{names[0]}: own, 30% supervised", lambda: first.own(share=0.3)
    yield f"{names[0]}: own, any kernel", lambda: first.own(deterministic=False)


def compiled_case(part: Part, name: str, systems: Systems) -> Cases:
    """``train.compile: blocks``; on a CPU its compiler may be missing, and the project's own tests have it."""
    if part.full and part.left() > COMPILATION:
        yield f"{name}: own, compiled blocks", lambda: systems.own(prepare=compile_blocks, with_profile=True)


def peer_cases(name: str, systems: Systems) -> Cases:
    """transformers' class, in the largest batches that fit."""
    sizes, parts = (8, 4, 2), (1, 2, 4)
    yield (
        f"{name}: transformers, padded",
        lambda: systems.either(*(lambda size=size: systems.padded(size) for size in sizes)),
    )
    yield (
        f"{name}: transformers, packed",
        lambda: systems.either(
            *(lambda part=part: systems.packed("sdpa", systems.row_tokens // part) for part in parts)
        ),
    )


def cases(part: Part) -> Cases:
    """The ceiling, then the models under it."""
    yield "ceilings", lambda: ceilings(part)
    yield from model_cases(part, part.cases["ceilings"].get("gemm_tflops", math.nan))


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
