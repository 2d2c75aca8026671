"""What it saves to compute a shared prompt once: forward and backward of a small decoder on completions of one prompt.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.shared_prefix --output tests/benchmarks/results/shared_prefix.json

The same documents, packed plainly (each with its own copy of the prompt) and with the prompt shared. Both run the
loss's own output head on the completions' tokens alone, which sharing leaves as it is, so the body is what differs.
Peers take turns within each round, so that a noisy neighbour hits both. Ratios of wall time and of the process's own
CPU time stand beside the bound of tokens (what projections and norms save, the most that there is to save) and the
ratio of counted operations (projections, head and attention pairs, as ``training.flops`` counts them). On a busy
machine one thread (``OMP_NUM_THREADS=1``) keeps waiting out of the CPU time.
"""

from __future__ import annotations

import json
import time
from statistics import median

import numpy as np

from posttrain_lib.data.collate import to_torch
from posttrain_lib.losses import build_loss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.training.flops import batch_flops
from tests.benchmarks.recording import Recording, argument_parser

#: a Qwen3 with the proportions of the smallest real one: twice as many queries as keys, a feed-forward of three times
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attention_bias": False,
    "hidden_act": "silu",
}


def batches(group: int, prompt: int, completion: int) -> dict[str, PackedBatch]:
    """``group`` completions of one prompt, shared and plain; the same trained tokens.

    A branch repeats the prompt's last token, which predicts another first token in each completion.
    """
    random = np.random.default_rng(0)
    head = random.integers(0, CONFIG["vocab_size"], prompt)
    tails = [np.append(head[-1], random.integers(0, CONFIG["vocab_size"], completion)) for _ in range(group)]
    branches = [(tail, np.arange(prompt - 1, prompt + completion)) for tail in tails]
    whole = [(np.append(head[:-1], tail), np.arange(prompt + completion)) for tail in tails]
    shared = [(head[:-1], np.arange(prompt - 1)), *branches]
    return {
        "shared": _packed(shared, prompt - 1, [-1, *[0] * group]),
        "plain": _packed(whole, prompt - 1, None),
    }


def _packed(segments: list[tuple[np.ndarray, np.ndarray]], untrained: int, parents: list[int] | None) -> PackedBatch:
    """Every token from place ``untrained`` of its document on predicts the next, the last one of a segment none."""
    lengths = [len(tokens) for tokens, _ in segments]
    ends = np.cumsum(lengths)
    positions = np.concatenate([places for _, places in segments])
    token_ids = np.concatenate([tokens for tokens, _ in segments])
    weights = (positions >= untrained).astype(np.float32)
    weights[ends - 1] = 0
    return PackedBatch(
        token_ids=token_ids,
        target_ids=np.append(token_ids[1:], 0),
        loss_weights=weights,
        positions=positions,
        cu_seqlens=np.append(0, ends).astype(np.int32),
        supervised_index=np.flatnonzero(weights),
        document_sources=np.zeros(len(lengths), np.int32),
        document_ids=np.arange(len(lengths)),
        max_seqlen=max(lengths),
        real_tokens=int(ends[-1]),
        parents=None if parents is None else np.asarray(parents, np.int32),
    )


def measure(spec: ModelSpec, group: int, prompt: int, completion: int, rounds: int) -> dict[str, object]:
    """Times of both ways, and their ratios beside what can be saved."""
    model = build_model(spec)
    init_weights(model, spec, seed=0)
    loss = build_loss("sft")
    arrays = batches(group, prompt, completion)
    tensors = {name: to_torch(batch) for name, batch in arrays.items()}
    wall: dict[str, list[float]] = {name: [] for name in arrays}
    own: dict[str, list[float]] = {name: [] for name in arrays}
    sums: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, batch in tensors.items():
            start = time.perf_counter(), time.process_time()
            output = loss(model, batch)
            output.local_sum.backward()
            if turn:  # the first round warms up
                wall[name].append(1e3 * (time.perf_counter() - start[0]))
                own[name].append(1e3 * (time.process_time() - start[1]))
            model.zero_grad(set_to_none=True)
            sums[name] = float(output.local_sum.detach())
    tokens = {name: batch.real_tokens for name, batch in arrays.items()}
    flops = {name: batch_flops(spec, batch) for name, batch in arrays.items()}
    return {
        "group_size": group,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "rounds": rounds,
        "tokens": tokens,
        "loss_relative_difference": abs(sums["shared"] / sums["plain"] - 1),
        "median_wall_ms": {name: round(median(values), 1) for name, values in wall.items()},
        "median_cpu_ms": {name: round(median(values), 1) for name, values in own.items()},
        "speedup_wall": round(_median_ratio(wall), 2),
        "speedup_cpu": round(_median_ratio(own), 2),
        "bound_by_tokens": round(group * (prompt + completion) / (prompt + group * completion), 2),
        "ratio_of_counted_flops": round(flops["plain"] / flops["shared"], 2),
    }


def _median_ratio(times: dict[str, list[float]]) -> float:
    """The median of the rounds' ratios: both of a round saw the same neighbours, if any did."""
    return median(plain / shared for plain, shared in zip(times["plain"], times["shared"], strict=True))


def main() -> None:
    """A prompt of four completions' length, one of a quarter of it, and a pair; two minutes of CPU time."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns that are timed, after one that is not")
    options = parser.parse_args()
    recording = Recording()
    spec = spec_from_config(CONFIG)
    cases = []
    for group, prompt, completion in ((8, 512, 128), (8, 128, 512), (2, 512, 256)):
        cases.append(measure(spec, group, prompt, completion, options.rounds))
        print(json.dumps(cases[-1]))
    recording.write(options.output, {"cases": cases})


if __name__ == "__main__":
    main()
