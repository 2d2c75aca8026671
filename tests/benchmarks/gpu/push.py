"""New weights into a rollout engine in another process, by CUDA IPC, proved by both ends' digests.

The policy is here, the engine behind a channel, both on one device: the policy's tensors go under their Hugging Face
names through a buffer of bounded size into the engine's parameters. ``push`` is all of that with the digests, from the
first tensor read to the digests compared; ``bare`` is the same without the digests of either end, and ``copy`` a plain
copy of as many bytes on the device. The sizes are Qwen3-4B's, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from posttrain_lib.adapters.vllm_channel import Channel, Inbox
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.rl.engine.weights import hf_weights, take_weights
from posttrain_lib.rl.sync_guard import Digest
from tests.benchmarks.gpu.common import Cases, Part, main, seconds_of, significant

#: published sizes of Qwen3-4B
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
ROUNDS = 9
#: seconds for an answer
LONG = 120.0


def spec_of(full: bool) -> ModelSpec:
    """The model's description."""
    return spec_from_config(QWEN3_4B if full else {**QWEN3_4B, **SMALL})


def made(full: bool, device: str) -> tuple[Decoder, ModelSpec]:
    """A model of random weights, in bfloat16."""
    spec = spec_of(full)
    model = build_model(spec, dtype=torch.bfloat16, device=torch.device(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.requires_grad_(False), spec


class Engine:
    """The other process: parameters, and nothing that reads them."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._model: tuple[Decoder, ModelSpec] | None = None

    def answer(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """ "make": the parameters; "push" and "bare": new ones, with their digest or without."""
        if what == "make":
            self._model = made(*arguments)
            return None
        assert self._model is not None, "made first"
        received = Digest()
        weights = self._inbox.tensors(arguments[0])
        take_weights(*self._model, received.through(weights) if what == "push" else weights)
        return received.text() if what == "push" else None


def push_case(part: Part) -> Mapping[str, Any]:
    """Milliseconds of a push, in turns with the bare one and the copy."""
    device = part.device.type
    policy, spec = made(part.full, device)
    weights = dict(hf_weights(policy, spec))
    size = sum(tensor.nbytes for tensor in weights.values())
    source = torch.empty(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    channel = Channel("tests.benchmarks.gpu.push_engine", {}, torch.device("cuda", 0) if device == "cuda" else None)

    def push() -> None:
        sending = Digest()
        received = channel.push("push", sending.through(hf_weights(policy, spec)), seconds=LONG)
        assert received == sending.text(), "the engine has other weights"

    def bare() -> None:
        channel.push("bare", hf_weights(policy, spec), seconds=LONG)

    ways: dict[str, Callable[[], object]] = {"push": push, "bare": bare, "copy": lambda: target.copy_(source)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    try:
        channel.call("make", part.full, device, seconds=LONG)
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                elapsed = seconds_of(part, way)
                if turn:  # the first one opens and allocates
                    times[name].append(elapsed)
    finally:
        channel.close()
    found = {name: median(values) for name, values in times.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "tensors": len(weights),
        "gib": significant(size / 2**30),
        "median_ms": {name: significant(1e3 * seconds) for name, seconds in found.items()},
        "min_ms": {name: significant(1e3 * min(values)) for name, values in times.items()},
        "push_gib_per_s": significant(size / 2**30 / found["push"]),
        "push_over_copy": significant(found["push"] / found["copy"]),
    }


def run(part: Part) -> None:
    """One case."""
    cases: Cases = iter([("Qwen3-4B" if part.full else "small", lambda: push_case(part))])
    part.run(cases)


if __name__ == "__main__":
    main(run, __doc__)
