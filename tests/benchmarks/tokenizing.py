"""Speed of the tokenising engines side by side, in one run:

    python -m tests.benchmarks.tokenizing --output tests/benchmarks/results/tokenize.json

Peers take turns within each round; medians are printed with their ratio to Hugging Face's, by the wall and in time of
the processor (which a machine shared with others disturbs less). Every library is held to one thread but where the
peer's name says otherwise. "new" is an engine that has read nothing yet: gigatoken remembers the words it has seen.
Real conversations are those of POSTTRAIN_DATA (default ../shared/data), rendered with each tokenizer's own template
(gpt2, which has none: Llama 3's).
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.engine_gate import choose_engine
from posttrain_lib.data.engines import GigatokenEngine
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.schema.examples import Message
from tests.benchmarks.recording import Recording, argument_parser

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("POSTTRAIN_DATA") or ROOT.parent / "shared" / "data")
NAMES = ("gpt2", "qwen2.5", "qwen3", "gpt-oss", "mistral-v3", "phi-3-mini")


def messages_of(row: dict[str, Any]) -> list[Message]:
    """A row's turns."""
    return [Message(turn["role"], turn["content"]) for turn in row["messages"]]


def corpora(tokenizer: ChatTokenizer, share: int) -> dict[str, list[str]]:
    """Rendered texts by name of the corpus: every ``share``-th real conversation, and generated ones."""
    lines = (DATA / "chat" / "chat.jsonl").read_text(encoding="utf-8").splitlines()[::share]
    real = [row for row in map(json.loads, lines) if row["messages"][0]["role"] == "user"]
    lines = [turn["content"] for row in generate_rows(3000, 0) for turn in row["messages"]]
    return {
        "real chat": [tokenizer.render(messages_of(row)) for row in real],
        "generated prose": [" ".join(lines[start : start + 60]) for start in range(0, len(lines), 60)],
    }


def compare(
    peers: dict[str, Callable[[], object]], rounds: int, size: float, tokens: int
) -> dict[str, dict[str, float]]:
    """Times of each peer, by the wall and of the processor; the ratios are to the first."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    used: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            start, used_before = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - used_before)
    medians = {name: sorted(values)[rounds // 2] for name, values in times.items()}
    cpu = {name: sorted(values)[rounds // 2] for name, values in used.items()}
    first = next(iter(peers))
    result = {
        name: {
            "median_ms": round(1e3 * medians[name], 2),
            "min_ms": round(1e3 * min(values), 2),
            "MB_per_s": round(size / medians[name], 2),
            "tokens_per_s": round(tokens / medians[name]),
            "times_hf": round(medians[first] / medians[name], 1),
            "MB_per_cpu_s": round(size / cpu[name], 2),
            "times_hf_per_cpu_s": round(cpu[first] / cpu[name], 1),
        }
        for name, values in times.items()
    }
    for name, figures in result.items():
        print(f"  {name:34s} {figures['MB_per_s']:8.1f} MB/s {figures['times_hf']:7.1f} x", end="")
        print(f"   cpu {figures['MB_per_cpu_s']:8.1f} MB/s {figures['times_hf_per_cpu_s']:7.1f} x", flush=True)
    return result


def measure(name: str, share: int, rounds: int) -> dict[str, Any]:
    """All peers on both corpora for one tokenizer."""
    template = {"chat_template": DATA / "chat_templates" / "llama3.jinja"} if name == "gpt2" else {}
    reference = ChatTokenizer(DATA / "tokenizers" / name, engine="hf", **template)
    start = time.perf_counter()
    ours = ChatTokenizer(DATA / "tokenizers" / name, **template)
    loaded = time.perf_counter()
    verdict = ours.gate_verdict()
    proved = time.perf_counter()
    assert verdict is not None
    result: dict[str, Any] = {"gate": verdict.as_dict(), "load_s": round(loaded - start, 2)}
    result["engine_and_gate_s"] = round(proved - loaded, 2)
    if not verdict.passed:
        print(f"{name}: not used, {verdict.reason}")
        return result
    backend = reference._tokenizer.backend_tokenizer
    engine, _ = choose_engine(ours._tokenizer, ours._samples())
    for title, texts in corpora(ours, share).items():
        size = sum(len(text.encode()) for text in texts) / 1e6
        tokens = sum(map(len, engine.encode_batch(texts)))
        print(f"{name}, {title}: {len(texts)} texts, {size:.2f} MB, {tokens} tokens")
        fresh = [GigatokenEngine(ours._tokenizer) for _ in range(rounds)]
        ids = {
            "HF encode_batch_fast": lambda texts=texts: backend.encode_batch_fast(texts, add_special_tokens=False),
            "engine": lambda texts=texts: engine.encode_batch(texts),
            "engine, 2 threads": lambda texts=texts: engine.encode_batch(texts, 2),
            "engine, new": lambda texts=texts, fresh=fresh: fresh.pop().encode_batch(texts),
        }
        offsets = {
            "HF through ChatTokenizer.encode": lambda texts=texts: [reference.encode(text) for text in texts],
            "ChatTokenizer.encode": lambda texts=texts: [ours.encode(text) for text in texts],
        }
        facts = {"texts": len(texts), "MB": round(size, 3), "tokens": tokens}
        result[title] = {**facts, "ids": compare(ids, rounds, size, tokens)}
        result[title]["ids and offsets"] = compare(offsets, rounds, size, tokens)
    result["fallbacks"] = ours.engine_report["fallbacks"]
    return result


def main() -> None:
    """Every tokenizer; several minutes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tokenizers", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--share", type=int, default=10, help="take one real conversation in so many")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    recording = Recording("gigatoken")
    results = {name: measure(name, options.share, options.rounds) for name in options.tokenizers}
    recording.write(options.output, {"rounds": options.rounds, "cases": results})


if __name__ == "__main__":
    main()
