"""The embedded engine's decoding: answers of groups of one prompt, against transformers' ``generate``.

``first_seconds`` is the first round, with what is compiled and tuned in it; the medians are of later ones, in turns.
transformers gets a group's prompt as often as there are answers, as its users give it. ``of_a_step`` is the mean of a
few steps in the middle of a round, as the profiler sees them: how long the device worked, how often the host launched,
waited and copied, and where its own time went.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.engine.weights import hf_weights
from posttrain_lib.schema.rollouts import Request, Sampling
from tests.benchmarks.gpu.common import Cases, Part, main, seconds_of, significant

#: published sizes of Qwen3-0.6B, and a model to train from scratch
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "attention_bias": False,
}  # fmt: skip
SCRATCH = {**QWEN3, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
SMALL = {**QWEN3, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
ROUNDS = 3
PROFILED_STEPS = 8
#: calls of CUDA's runtime that are counted
COUNTED = ("cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync")
SHOWN = 8


def made(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> tuple[Decoder, ModelSpec]:
    """A model of random weights."""
    spec = spec_from_config(dict(sizes))
    model = build_model(spec, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval().requires_grad_(False), spec


def peer(sizes: Mapping[str, Any], model: Decoder, spec: ModelSpec) -> Any:
    """transformers' model of the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes)
    with torch.device(model.head_weight.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=model.head_weight.dtype)
    loaded = theirs.load_state_dict(dict(hf_weights(model, spec)), strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}, loaded  # it is tied
    return theirs.eval()


def decode_case(
    part: Part, sizes: Mapping[str, Any], dtype: torch.dtype, prompts: int, group: int, tokens: tuple[int, int]
) -> Mapping[str, Any]:
    """Seconds and tokens per second of ``prompts`` x ``group`` answers; ``tokens``: of a prompt, of an answer."""
    model, spec = made(sizes, dtype, part.device)
    asked, answered = tokens
    engine = EmbeddedEngine(model, spec, window=asked + answered, slots=prompts * group)
    ids = torch.randint(sizes["vocab_size"], (prompts, asked), device=part.device)
    sampling = Sampling(answered)
    requests = [
        Request(f"{number}/{place}", tuple(row), sampling, seed=number * group + place)
        for number, row in enumerate(ids.tolist())
        for place in range(group)
    ]
    theirs, repeated = peer(sizes, model, spec), ids.repeat_interleave(group, 0)
    length = {"max_new_tokens": answered, "min_new_tokens": answered}

    def ours() -> None:
        engine.submit(requests)
        while engine.unfinished:
            engine.step()

    def generate() -> None:
        theirs.generate(repeated, do_sample=True, top_k=0, pad_token_id=0, **length)

    ways: dict[str, Callable[[], None]] = {"ours": ours, "transformers": generate}
    times: dict[str, list[float]] = {name: [seconds_of(part, way)] for name, way in ways.items()}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(seconds_of(part, way))
    found = {name: median(values[1:]) for name, values in times.items()}
    count = prompts * group * answered
    return {
        "answers": prompts * group,
        "tokens": {"prompt": asked, "answer": answered},
        "dtype": str(dtype).removeprefix("torch."),
        "first_seconds": {name: significant(values[0]) for name, values in times.items()},
        "tokens_per_second": {name: significant(count / seconds) for name, seconds in found.items()},
        "transformers_over_ours": significant(found["transformers"] / found["ours"]),
        "ms_per_step": significant(1e3 * found["ours"] / answered),
        "of_a_step": _profiled(part, engine, requests, answered // 2),
    }


def _profiled(part: Part, engine: EmbeddedEngine, requests: list[Request], before: int) -> dict[str, Any]:
    engine.submit(requests)
    for _ in range(before):
        engine.step()
    device = part.device.type == "cuda"
    steps = min(PROFILED_STEPS, before)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]) as seen:
        for _ in range(steps):
            engine.step()
    engine.abort()
    events = seen.key_averages()
    longest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN]
    return {
        "device_ms": significant(sum(event.self_device_time_total for event in events) / 1e3 / steps),
        "calls": {name: sum(event.count for event in events if event.key == name) / steps for name in COUNTED},
        "host_ms": {event.key[:60]: significant(event.self_cpu_time_total / 1e3 / steps) for event in longest},
    }


def cases(part: Part) -> Cases:
    """A model from scratch, and Qwen3-0.6B."""
    if not part.full:
        yield "small, float32", lambda: decode_case(part, SMALL, torch.float32, 2, 2, (5, 6))
        return
    for dtype in (torch.float32, torch.bfloat16):
        name = f"scratch, {str(dtype).removeprefix('torch.')}"
        yield name, lambda dtype=dtype: decode_case(part, SCRATCH, dtype, 16, 8, (80, 160))
    yield "Qwen3-0.6B, bfloat16", lambda: decode_case(part, QWEN3, torch.bfloat16, 16, 8, (128, 256))


def run(part: Part) -> None:
    """All cases."""
    part.run(cases(part))


if __name__ == "__main__":
    main(run, __doc__)
