"""Parts of an update of reinforcement learning: what a shared prompt saves, and what new weights cost the engine.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.grpo_parts --output tests/benchmarks/results/grpo_parts.json

*update*: forward and backward of the policy's loss on eight completions of one prompt, packed as a step packs them,
with the prompt shared and without. The ratio of their times stands beside G(P + R) / (P + G R), what there would be to
save if every token cost the same, and beside the ratio of counted operations: the output head computes trained tokens
alone, which sharing leaves as they are, so that a model with a smaller head comes nearer to the first. With the old
log-probabilities a step needs four products of the head, without three. *push*: weights of the trainer into the
embedded engine by their Hugging Face names, both sides' digests among it, beside a plain copy of the same bytes. Ways
take turns within each round, and medians count; shares are of the process's own time, which neighbours lengthen less
than the clock's.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from posttrain_lib.data.collate import to_torch
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.policy import ADVANTAGES, OLD, ROLLOUT
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.engine.weights import hf_weights
from posttrain_lib.rl.packing import pack_samples
from posttrain_lib.rl.sync_guard import Digest
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.rollouts import TrainSample
from posttrain_lib.training.flops import batch_flops
from tests.benchmarks.recording import Recording, argument_parser

GROUP, PROMPT, COMPLETION = 8, 512, 128
#: sizes at which products take most of the time; the second has next to no head
MODELS = {
    "8 layers of 512, 32k words": {"num_hidden_layers": 8, "vocab_size": 32768},
    "8 layers of 512, 4k words": {"num_hidden_layers": 8, "vocab_size": 4096},
}
#: by about their number of parameters
PUSHED = {
    "1 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 2048},
    "10 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 16384},
    "60 M": {"num_hidden_layers": 14, "vocab_size": 32768},
}
#: share of the bound by tokens, and largest difference of a gradient, to reach
LEAST_SHARE, MOST_DIFFERENCE = 0.85, 1e-5

Times = dict[str, list[tuple[float, float]]]


def spec_of(**changes: Any) -> ModelSpec:
    """A Qwen3 of width 512 with the proportions of the smallest real one."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
        "hidden_act": "silu",
        **changes,
    }
    heads = config["hidden_size"] // 64
    return spec_from_config({**config, "num_attention_heads": heads, "num_key_value_heads": heads // 2})


def made(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model with random weights."""
    model = build_model(spec, dtype=dtype)
    init_weights(model, spec, seed=0)
    return model


def timed(times: Times, name: str, work: Callable[[], Any]) -> Any:
    """Run it; keep the seconds of the clock and the process's own."""
    begun = time.perf_counter(), time.process_time()
    found = work()
    times.setdefault(name, []).append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return found


def ratio(times: Times, of: str, to: str, clock: int) -> float:
    """The median of the rounds' ratios: both of a round saw the same neighbours, if any did."""
    return round(median(one[clock] / other[clock] for one, other in zip(times[of], times[to], strict=True)), 3)


def group_of_samples(vocabulary: int, with_old: bool) -> list[TrainSample]:
    """One prompt, and completions that are worth something."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, vocabulary, PROMPT, dtype=np.int32)
    samples = []
    for number in range(GROUP):
        ids = np.concatenate([prompt, random.integers(0, vocabulary, COMPLETION, dtype=np.int32)])
        said = (-np.log(vocabulary) + 0.1 * random.standard_normal(COMPLETION)).astype(np.float32)
        signals = {ADVANTAGES: np.full(COMPLETION, random.standard_normal(), np.float32), ROLLOUT: said}
        signals |= {OLD: said} if with_old else {}
        samples.append(TrainSample(ids, np.arange(len(ids)) >= PROMPT, PROMPT, 0, number, signals))
    return samples


def measure_update(spec: ModelSpec, with_old: bool, rounds: int) -> dict[str, Any]:
    """Times with the prompt shared and without, and how far their gradients are apart."""
    model, loss = made(spec), build_loss("policy")
    samples = group_of_samples(spec.config.vocab_size, with_old)
    ways = {
        name: pack_samples(samples, row_tokens=GROUP * (PROMPT + COMPLETION), share_prefixes=name == "shared")
        for name in ("shared", "plain")
    }
    batches = {name: way.micro_batches[0] for name, way in ways.items()}

    def update(arrays: PackedBatch) -> None:
        signals = loss.signals(arrays, "train")
        output = loss(model, to_torch(dataclasses.replace(arrays, signals=signals)))
        (output.local_sum / loss.divisor(arrays)).backward()

    times: Times = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for turn in range(rounds + 1):
        for name, batch in batches.items():
            timed(times if turn else {}, name, lambda batch=batch: update(batch))
            if not turn:
                gradients[name] = {key: one.grad.clone() for key, one in model.named_parameters()}
            model.zero_grad(set_to_none=True)
    apart = max(float((one - gradients["plain"][key]).abs().max()) for key, one in gradients["shared"].items())
    bound = GROUP * (PROMPT + COMPLETION) / (PROMPT + GROUP * COMPLETION)
    flops = {name: batch_flops(spec, batch) for name, batch in batches.items()}
    wall, own = ratio(times, "plain", "shared", 0), ratio(times, "plain", "shared", 1)
    return {
        "old_logprobs": with_old,
        "tokens": {name: way.tokens for name, way in ways.items()},
        "median_ms": {name: round(1e3 * median(one[0] for one in each), 1) for name, each in times.items()},
        "speedup": wall,
        "speedup_of_own_time": own,
        "bound_by_tokens": round(bound, 3),
        "ratio_of_counted_flops": round(flops["plain"] / flops["shared"], 3),
        "share_of_bound": round(own / bound, 3),
        "share_of_counted_flops": round(own * flops["shared"] / flops["plain"], 3),
        "largest_gradient": max(float(one.abs().max()) for one in gradients["plain"].values()),
        "largest_gradient_difference": apart,
        "to_reach": {
            "share_of_bound": LEAST_SHARE,
            "largest_gradient_difference": MOST_DIFFERENCE,
            "reached": own / bound >= LEAST_SHARE and apart <= MOST_DIFFERENCE,
        },
    }


def measure_push(spec: ModelSpec, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds and rate of new weights, and of a copy of as many bytes."""
    policy = made(spec, dtype)
    engine = EmbeddedEngine(made(spec, dtype).eval().requires_grad_(False), spec, window=64, slots=1)
    weights = [(name, tensor.detach()) for name, tensor in hf_weights(policy, spec)]
    size = sum(tensor.nbytes for _, tensor in weights)
    into = [torch.empty_like(tensor) for _, tensor in weights]

    def push() -> None:
        sending = Digest()
        received = engine.push(sending.through(hf_weights(policy, spec)), engine.version + 1)
        assert received == sending.text(), "the engine has other weights"

    def copy() -> None:
        for (_, tensor), target in zip(weights, into, strict=True):
            target.copy_(tensor)

    times: Times = {}
    for turn in range(rounds + 1):
        timed(times if turn else {}, "push", push)
        timed(times if turn else {}, "copy", copy)
    seconds = {name: median(one[0] for one in each) for name, each in times.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "mib": round(size / 2**20, 2),
        "push_ms": round(1e3 * seconds["push"], 2),
        "copy_ms": round(1e3 * seconds["copy"], 2),
        "push_gib_per_second": round(size / 2**30 / seconds["push"], 2),
        "push_over_copy": ratio(times, "push", "copy", 0),
    }


def main() -> None:
    """Both parts, some minutes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed, after one that is not")
    options = parser.parse_args()
    recording = Recording()
    pushes, updates = [], []
    for name, changes in PUSHED.items():
        for dtype in (torch.float32, torch.bfloat16):
            pushes.append({"about": name, **measure_push(spec_of(**changes), dtype, 5 * options.rounds)})
            print(json.dumps(pushes[-1]), flush=True)
    for name, changes in MODELS.items():
        for with_old in (False, True):
            updates.append({"model": name, **measure_update(spec_of(**changes), with_old, options.rounds)})
            print(json.dumps(updates[-1]), flush=True)
    shape = {"group": GROUP, "prompt_tokens": PROMPT, "completion_tokens": COMPLETION, "rounds": options.rounds}
    recording.write(options.output, {**shape, "updates": updates, "pushes": pushes})


if __name__ == "__main__":
    main()
