"""What recomputation keeps and costs, what compiled blocks gain, and what a compiler makes of single operations:

    python -m tests.benchmarks.recompute --output tests/benchmarks/results/recompute.json

Peers take turns within each round, on one thread, and what counts is the process's own time on a CPU: a busy machine
disturbs it less than the clock on the wall. ``held_mib`` are the bytes of tensors that are alive between forward and
backward, weights and gradients not counted; not known of compiled blocks. Where nothing can be compiled, the compiled
peers are left out, and the reason stands in the result. The result is written after each case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.environment import describe_code, describe_environment, describe_hardware
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.heads import hidden_states
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.rope import apply_rope
from posttrain_lib.ops.swiglu import swiglu
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.compilation import check_compiler
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.mesh import SINGLE
from tests.benchmarks.ops import _lengths
from tests.support.held_bytes import HeldBytes

CPU = torch.device("cpu")
TOKENS, MEAN, LAYERS = 1024, 256, 2
RESULTS: dict[str, dict[str, dict[str, float]]] = {}
_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **_SIZES},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
    },
}


def compare(title: str, peers: dict[str, Callable[[], object]], rounds: int) -> None:
    """Print and keep each peer's seconds on a CPU; ratios are to the first, round by round, and their median counts."""
    for run in peers.values():
        run()  # compiles, and makes the gradients
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    print(title)
    first = next(iter(times.values()))
    RESULTS[title] = {}
    for name, values in times.items():
        ratios = [value / own for value, own in zip(values, first, strict=True)]
        figures = {"min_ms": min(values), "median_ms": median(values), "median_over_first": median(ratios)}
        RESULTS[title][name] = {key: round(value, 3) for key, value in figures.items()}
        print(f"  {name:28s}", *(f"{key} {value:9.2f}" for key, value in figures.items()), flush=True)


def blocks(name: str, compiles: bool, rounds: int) -> None:
    """Forward and backward of a packed row through the blocks, by what is kept and whether they are compiled."""
    spec = spec_from_config(MODELS[name])
    lengths = _lengths(TOKENS, MEAN)
    row = (
        torch.randint(spec.config.vocab_size, (TOKENS,)),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max(lengths),
    )
    pull = torch.randn(TOKENS, spec.config.hidden_size)
    peers: dict[str, Callable[[], object]] = {}
    held: dict[str, int] = {}
    for compilation in ("none", "blocks") if compiles else ("none",):
        for mode in ("none", "selective", "full"):
            model = build_model(spec)
            init_weights(model, spec, seed=0)
            alone = rank_mesh(SINGLE, CPU)
            apply_parallelism(model, mesh=alone, activation_checkpointing=mode, compilation=compilation)
            peer = f"{mode}, {'compiled' if compilation == 'blocks' else 'not compiled'}"
            peers[peer] = lambda model=model: (model(*row, hidden_states) * pull).sum().backward()
            if compilation == "none":  # compiled code allocates where nothing sees it
                held[peer] = _held(model, row)
    title = f"blocks: {name}, {TOKENS} tokens, {len(lengths)} documents, {LAYERS} layers, hidden 512, float32"
    compare(title, peers, rounds)
    for peer, size in held.items():
        RESULTS[title][peer]["held_mib"] = round(size / 2**20, 1)
        print(f"  {peer:28s} held {size / 2**20:8.1f} MiB")


def _held(model: Decoder, row: tuple[Any, ...]) -> int:
    with HeldBytes() as bytes_of:
        hidden = model(*row, hidden_states)
    held = bytes_of.held()
    hidden.sum().backward()
    return held


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as autograd records it."""
    return weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))


def our_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as the models have it: forward and backward written out."""
    return rms_norm(hidden, weight, 1e-6)


def rope(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads of 64."""
    return apply_rope(hidden.unflatten(-1, (-1, 64)), cosine, sine).flatten(-2)


def added(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The norm of a sum, as between attention and feed-forward."""
    return lambda hidden, weight, other: norm(hidden + other, weight)


#: operation -> (ours, the same under autograd where ours is another, its inputs)
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None, tuple[str, ...]]] = {
    "norm": (our_norm, plain_norm, ("hidden", "weight")),
    "rope, heads of 64": (rope, None, ("hidden", "cosine", "sine")),
    "swiglu": (swiglu, None, ("hidden", "other")),
    "residual and norm": (added(our_norm), added(plain_norm), ("hidden", "weight", "other")),
}


def operation(name: str, tokens: int, size: int, compiles: bool, rounds: int) -> None:
    """Forward and backward of one operation: ours, plain autograd, compiled."""
    angles = torch.randn(tokens, 1, 32)
    values = {
        "hidden": torch.randn(tokens, size, requires_grad=True),
        "other": torch.randn(tokens, size, requires_grad=True),
        "weight": torch.ones(size, requires_grad=True),
        "cosine": angles.cos(),
        "sine": angles.sin(),
    }
    pull = torch.randn(tokens, size)
    ours, plain, names = OPERATIONS[name]
    inputs = [values[key] for key in names]
    runs = {"ours": ours} if plain is None else {"ours": ours, "under autograd": plain}
    if compiles:
        runs |= {f"{peer}, compiled": torch.compile(run, dynamic=False) for peer, run in runs.items()}
    peers = {peer: lambda run=run: (run(*inputs) * pull).sum().backward() for peer, run in runs.items()}
    compare(f"{name}: {tokens} x {size}, float32", peers, rounds)


def main() -> None:
    """All cases; most of the time goes into compiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="result file to write")
    options = parser.parse_args()
    load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    print(f"load {load}")
    torch.set_num_threads(1)
    reason = None
    try:
        check_compiler(CPU)
    except ConfigError as error:
        reason = str(error)
        print(reason)
    torch.manual_seed(0)
    for name in MODELS:
        blocks(name, reason is None, rounds=7)
        write(options.output, load, reason)
    for name in OPERATIONS:
        operation(name, 4096, 1024, reason is None, rounds=15)
        write(options.output, load, reason)


def write(output: Path | None, load: str, reason: str | None) -> None:
    """The result so far, where one is asked for."""
    if output is None:
        return
    facts = describe_environment() | describe_hardware()
    content = {
        "command": "python -m tests.benchmarks.recompute --output tests/benchmarks/results/recompute.json",
        "date": datetime.date.today().isoformat(),
        "commit": describe_code().get("commit"),
        "hardware": {name: facts[name] for name in ("cpu", "cores", "machine", "python", "torch")},
        "threads": torch.get_num_threads(),
        "load_at_start": load,
        "not_compiled_because": reason,
        "cases": RESULTS,
    }
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
