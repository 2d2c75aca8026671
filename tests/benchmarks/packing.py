"""Packing beside its peers, in one run: fill, rates, waste, delays, ranks, first batch, and what training gains by it.

    ./infra/env pip install --no-deps --target FOLDER -r infra/locks/peers.txt
    ./infra/env python -m tests.benchmarks.packing --peers FOLDER --output tests/benchmarks/results/packing.json

Ours is the whole way: a finished token store, StoreFeed, PackedLoader, batches with all their arrays. TRL gets the same
documents ready in an Arrow table and gives one back (``pack_dataset(..., "bfd")``); its collator, which makes tensors
of the rows, is measured apart. grain streams from arrays in memory into arrays. Rates count tokens of documents, by the
wall and by the processor's time (which other work on the machine disturbs less): medians of interleaved rounds. A peer
that cannot be imported has null figures, and no ratio is given. One thread each; ``background`` is a thread more.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.planner import Planner
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.lineage.environment import describe_code, describe_environment
from tests.benchmarks.packing_data import (
    HEAVY_TAILED,
    LOG_NORMAL,
    SEED,
    chat_documents,
    checksums,
    delays,
    generated_store,
    order_of,
    statistics_of,
    written_store,
)
from tests.benchmarks.packing_peers import (
    TrlCollator,
    arrow_dataset,
    check_trl,
    find_peers,
    grain_pack,
    trl_pack,
)
from tests.benchmarks.packing_ranks import ROWS_EACH, rank_imbalance

DATA = Path(os.environ.get("POSTTRAIN_DATA") or ROOT.parent / "shared" / "data")
BUFFERS = (64, 256, 1024)
#: rows of a step: eight ranks of eight
ROWS_PER_STEP = 64
ROUNDS = 5
#: a multiple of 1,024 that takes the longest real conversation
CHAT_ROW_TOKENS = 12288
#: documents that grain packs in a round: it is slow, and its rate does not depend on their number
GRAIN_DOCUMENTS = 2000
COLLATED_ROWS = 60
MILLION = 1_000_000


def load() -> str:
    return Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]


def feed_of(store: TokenStore, row_tokens: int, epochs: float | None = 1) -> StoreFeed:
    return StoreFeed(store, row_tokens=row_tokens, seed=SEED, epochs=epochs)


def run_ours(store: TokenStore, row_tokens: int, buffer: int, background: bool) -> tuple[int, float]:
    """(tokens, seconds to the first step) of a whole epoch; each step is dropped as the next one comes."""
    begun = time.perf_counter()
    feed = feed_of(store, row_tokens)
    settings = {"rows_per_step": ROWS_PER_STEP, "micro_batch_rows": ROWS_PER_STEP, "packing_buffer": buffer}
    with PackedLoader(feed, row_tokens=row_tokens, background=background, **settings) as loader:
        first = loader.next_step()
        assert first is not None
        seconds = time.perf_counter() - begun
        return first.real_tokens + sum(step.real_tokens for step in loader), seconds


class Timings:
    """Seconds of each system by round; the systems take turns."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def time(self, name: str, run: Callable[[], Any]) -> Any:
        """Run and keep its seconds."""
        gc.collect()
        begun, used = time.perf_counter(), time.process_time()
        result = run()
        self.wall.setdefault(name, []).append(time.perf_counter() - begun)
        self.processor.setdefault(name, []).append(time.process_time() - used)
        return result

    def rate(self, name: str, amount: float) -> dict[str, Any] | None:
        """Millions a second, median and best; None for what did not run."""
        if name not in self.wall:
            return None
        wall, processor = self.wall[name], self.processor[name]
        return {
            "tokens_per_second_M": round(amount / statistics.median(wall) / 1e6, 3),
            "best_tokens_per_second_M": round(amount / min(wall) / 1e6, 3),
            "tokens_per_processor_second_M": round(amount / statistics.median(processor) / 1e6, 3),
            "rounds": len(wall),
        }


def planned(store: TokenStore, row_tokens: int, buffer: int) -> dict[str, Any]:
    """Fill, waste by cause and delays, from the planner's rows."""
    order = order_of(feed_of(store, row_tokens))
    planner = Planner(feed_of(store, row_tokens), row_tokens=row_tokens, packing_buffer=buffer)
    begun = time.perf_counter()
    rows = planner.rows(len(store) + 1, 1)
    seconds = time.perf_counter() - begun
    flat = np.concatenate([np.asarray(row, np.int64) for row in rows])
    lengths = store.lengths
    used = np.add.reduceat(lengths[flat], np.cumsum([0, *map(len, rows[:-1])]), dtype=np.int64)
    # Rows made while the order still gave units are the steady state; what waits then is flushed.
    steady = int((np.cumsum([len(row) for row in rows]) <= len(store) - buffer + 1).sum())
    slots, late = len(rows) * row_tokens, delays(order, rows, buffer)
    free = row_tokens - used
    return {
        "packing_buffer": buffer,
        "fill": round(float(used.sum() / slots), 5),
        "fill_steady": round(float(used[:steady].mean() / row_tokens), 5) if steady else None,
        "rows": len(rows),
        "waste_share_of_slots": {
            "row_ends_steady": round(float(free[:steady].sum() / slots), 6),
            "final_flush": round(float(free[steady:].sum() / slots), 6),
            "truncated_tokens": int(lengths.sum(dtype=np.int64) - used.sum()),
            "documents_refused": len(store) - len(flat),
        },
        "multiset_preserved": bool((np.bincount(flat, minlength=len(store)) == 1).all()),
        "delay_rows": {"bound": buffer, "largest": int(late.max()), "median": int(np.median(late))},
        "planning_documents_per_second_M": round(len(store) / seconds / 1e6, 3),
    }


def verify_ours(store: TokenStore, row_tokens: int, buffer: int, sums: np.ndarray) -> bool:
    """Whether the loader's arrays hold every document once, whole, and the planned tokens and nothing else."""
    seen, right = np.zeros(len(store), np.int64), True
    settings = {"rows_per_step": ROWS_PER_STEP, "micro_batch_rows": ROWS_PER_STEP, "packing_buffer": buffer}
    with PackedLoader(feed_of(store, row_tokens), row_tokens=row_tokens, background=False, **settings) as loader:
        for step in loader:
            for batch in step.micro_batches:
                real = batch.document_ids >= 0
                examples = batch.document_ids[real]
                np.add.at(seen, examples, 1)
                found = np.add.reduceat(batch.token_ids, batch.cu_seqlens[:-1], dtype=np.int64)[real]
                right &= np.array_equal(found, sums[examples])
                right &= np.array_equal(np.diff(batch.cu_seqlens)[real], store.lengths[examples])
    return bool(right and (seen == 1).all())


def first_batches(store: TokenStore, row_tokens: int) -> dict[str, float]:
    """Milliseconds from before StoreFeed and PackedLoader are made to the first step of one and of 64 rows."""

    def measure(opened: Callable[[], TokenStore], rows: int) -> float:
        times = []
        for _ in range(ROUNDS):
            held = opened()
            begun = time.perf_counter()
            with PackedLoader(feed_of(held, row_tokens, None), row_tokens=row_tokens, rows_per_step=rows) as loader:
                loader.next_step()
                times.append(1e3 * (time.perf_counter() - begun))
        return round(statistics.median(times), 2)

    command = [sys.executable, "-m", "tests.benchmarks.packing", "--first-batch", str(store.folder), str(row_tokens)]
    fresh = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {
        "8_rows_ms": measure(lambda: store, 8),
        "64_rows_ms": measure(lambda: store, 64),
        # Files are compared with their digests when they are first read: here all that the first 8 rows touch.
        "8_rows_store_just_opened_ms": measure(lambda: TokenStore(store.folder), 8),
        # Store opened and checked, nothing packed yet: loads the compiled loops.
        "8_rows_fresh_process_ms": float(fresh),
    }


def first_batch_here(folder: str, row_tokens: int) -> None:
    """The first step of a fresh process; prints its milliseconds. The store's files are checked before."""
    store = TokenStore(folder)
    for _ in store.shards_of(np.arange(len(store))):
        pass
    begun = time.perf_counter()
    with PackedLoader(feed_of(store, row_tokens, None), row_tokens=row_tokens, rows_per_step=8) as loader:
        loader.next_step()
        print(1e3 * (time.perf_counter() - begun))


def measure_set(store: TokenStore, row_tokens: int, peers: dict[str, str | None], rounds: int) -> dict[str, Any]:
    """All figures of one set but training's. ``rounds`` of 1: a set so large that TRL's single batch is left out."""
    lengths, tokens, sums = store.lengths, store.total_tokens, checksums(store)
    result: dict[str, Any] = {"row_tokens": row_tokens, "lengths": statistics_of(lengths, row_tokens)}
    run_ours(store, row_tokens, BUFFERS[0], False)  # maps the files, loads the compiled loops
    result["ours"] = {f"buffer {buffer}": planned(store, row_tokens, buffer) for buffer in BUFFERS}
    for buffer in BUFFERS:
        right = verify_ours(store, row_tokens, buffer, sums)
        result["ours"][f"buffer {buffer}"]["arrays_hold_every_document_once"] = right
    timings, fills = Timings(), {}
    dataset = arrow_dataset(store) if peers["trl"] else None
    batch_sizes = {"trl, batches of 1000 (default)": 1000, "trl, one batch": len(store)}
    if rounds == 1:
        del batch_sizes["trl, one batch"]
    sample = np.random.default_rng(SEED).permutation(len(store))[:GRAIN_DOCUMENTS]
    collator = TrlCollator() if peers["trl"] else None
    collated = 0
    for number in range(rounds):
        for buffer in BUFFERS:
            timings.time(f"buffer {buffer}", lambda b=buffer: run_ours(store, row_tokens, b, False))
        timings.time("buffer 256, background", lambda: run_ours(store, row_tokens, 256, True))
        for name, size in batch_sizes.items() if dataset is not None else ():
            packed = timings.time(name, lambda size=size: trl_pack(dataset, row_tokens, size))
            if number == 0:
                fills[name] = round(check_trl(packed, lengths, sums, row_tokens), 5)
            if name.startswith("trl, b") and collator is not None:
                collated = timings.time("trl's collator", lambda p=packed: collator.run(p, COLLATED_ROWS))
            del packed
        for bins in (8, 64) if peers["grain"] else ():
            name = f"grain, {bins} bins"
            packed_tokens, rows = timings.time(name, lambda b=bins: grain_pack(store, sample, row_tokens, b))
            fills[name] = round(packed_tokens / rows / row_tokens, 5)
        print(f"  round {number + 1} of {rounds}, load {load()}", flush=True)
    for name in [f"buffer {buffer}" for buffer in BUFFERS]:
        result["ours"][name].update(timings.rate(name, tokens) or {})
    result["ours"]["buffer 256, background"] = timings.rate("buffer 256, background", tokens)
    result["peers"] = {
        name: None if name not in timings.wall else {"fill": fills[name], **(timings.rate(name, tokens) or {})}
        for name in batch_sizes
    }
    result["peers"]["trl's collator"] = timings.rate("trl's collator", collated)
    of_sample = float(lengths[sample].sum())
    for name in ("grain, 8 bins", "grain, 64 bins"):
        rate = timings.rate(name, of_sample)
        result["peers"][name] = rate and {"fill": fills[name], "documents": len(sample), **rate}
    result["ratios_of_buffer_256"] = ratios(result)
    result["first_batch"] = first_batches(store, row_tokens)
    return result


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Ours at a buffer of 256 over each peer, by the wall and by processor time; null without the peer."""
    ours, found = result["ours"]["buffer 256"], {}
    for name, peer in result["peers"].items():
        keys = ("tokens_per_second_M", "tokens_per_processor_second_M")
        found[name] = peer and {key.removesuffix("_M"): round(ours[key] / peer[key], 2) for key in keys}
    return found


def qwen3_pair_cost() -> float:
    from posttrain_lib.models.families import spec_from_folder
    from posttrain_lib.training.flops import relative_pair_cost

    return relative_pair_cost(spec_from_folder(DATA / "model_configs" / "qwen3-0.6b"))


def with_ranks(found: dict[str, Any], store: TokenStore, row_tokens: int) -> dict[str, Any]:
    """Adds the imbalance of eight ranks."""
    cost = qwen3_pair_cost()
    found["rank_imbalance"] = {"cost": f"row tokens + {cost:.3e} a query-key pair (Qwen3-0.6B)", "by_rows": []}
    for rows_each in ROWS_EACH:
        settings = {"row_tokens": row_tokens, "packing_buffer": 256, "pair_cost": cost, "rows_each": rows_each}
        found["rank_imbalance"]["by_rows"].append(rank_imbalance(feed_of(store, row_tokens, None), **settings))
    return found


def targets(sets: dict[str, Any], training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Every figure to reach, what was reached, and whether it is enough; null where it was not measured."""
    found: list[dict[str, Any]] = []

    def add(what: str, on: str, value: float | None, enough: Callable[[float], bool]) -> None:
        found.append({"figure": what, "on": on, "value": value, "reached": None if value is None else enough(value)})

    for name, values in sets.items():
        for buffer in BUFFERS:
            fill = values["ours"][f"buffer {buffer}"]["fill"]
            add(f"fill at a buffer of {buffer} >= 0.99", name, fill, lambda fill: fill >= 0.99)
            if values["row_tokens"] == LOG_NORMAL.cap:
                add(f"fill at a buffer of {buffer} >= 0.995", name, fill, lambda fill: fill >= 0.995)
        for peer, least in (("trl, batches of 1000 (default)", 10), ("grain, 8 bins", 100), ("grain, 64 bins", 100)):
            ratio = values["ratios_of_buffer_256"].get(peer)
            for clock in ("tokens_per_second", "tokens_per_processor_second"):
                value = ratio and ratio[clock]
                add(f"{least} times {peer}, {clock}", name, value, lambda value, least=least: value >= least)
        for what, value in values["first_batch"].items():
            add(f"first batch under 50 ms: {what}", name, value, lambda value: value < 50)
        for ranks in values.get("rank_imbalance", {}).get("by_rows", ()):
            what = f"imbalance at most 1.02, {ranks['rows_per_rank']} rows a rank"
            for kind in ("mean", "max"):
                add(f"{what}, {kind} over steps", name, ranks["modelled"]["dealt"][kind], lambda value: value <= 1.02)
    if training is not None:
        add("waiting for data under 1 % of step time", "training", training["data_wait_share"], lambda v: v < 0.01)
        for name, gain in training["gain_over"].items():
            add(f"more than 4.7 times '{name}'", "training", gain, lambda value: value > 4.7)
    return found


def main() -> None:
    """All sets, then training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="result file to write")
    parser.add_argument("--peers", type=Path, help="folder with the packages of infra/locks/peers.txt")
    parser.add_argument("--documents", type=int, default=50_000, help="documents of the generated sets")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--million", action="store_true", help="the generated sets with 1 M documents as well (9 GB)")
    parser.add_argument("--train-on-one-in", type=int, default=16, help="share of the conversations; 0: no training")
    parser.add_argument("--scratch", type=Path, help="where stores go for the time of the run")
    parser.add_argument("--first-batch", nargs=2, metavar=("STORE", "ROW_TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        first_batch_here(options.first_batch[0], int(options.first_batch[1]))
        return
    load_at_start, peers = load(), find_peers(options.peers)
    for name in (name for name, version in peers.items() if version is None):
        print(f"{name} cannot be imported: its column is null and no ratio is given")
    sets: dict[str, Any] = {}
    training = None
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        counts = [(options.documents, options.rounds)] + ([(MILLION, 1)] if options.million else [])
        for documents, rounds in counts:
            for law in (LOG_NORMAL, HEAVY_TAILED):
                name = f"{law.name}, {documents:,} documents"
                print(f"{name} (load {load()})", flush=True)
                store = generated_store(Path(scratch) / f"{law.name}-{documents}", law.lengths(documents))
                found = {"law": law.law, "seed": SEED, **measure_set(store, law.cap, peers, rounds)}
                sets[name] = with_ranks(found, store, law.cap)
        if DATA.is_dir():
            print(f"chat (load {load()})", flush=True)
            conversations, _ = chat_documents(DATA)
            pairs = ((tokens, np.ones(len(tokens), np.float32)) for tokens in conversations)
            store = written_store(Path(scratch) / "chat", pairs)
            found = measure_set(store, CHAT_ROW_TOKENS, peers, options.rounds)
            sets["chat"] = with_ranks(found, store, CHAT_ROW_TOKENS)
            if options.train_on_one_in:
                from tests.benchmarks.packing_training import compare_training

                print(f"training (load {load()})", flush=True)
                settings = {"row_tokens": CHAT_ROW_TOKENS, "every": options.train_on_one_in, "packing_buffer": 256}
                folder = Path(scratch) / "sample"
                training = compare_training(conversations, folder, rounds=options.rounds, **settings)
    facts = describe_environment()
    code = describe_code()
    content = {
        "command": "python -m tests.benchmarks.packing "
        + " ".join(sys.argv[1:]).replace(str(options.peers), "FOLDER").replace(str(options.scratch), "SCRATCH"),
        "date": datetime.date.today().isoformat(),
        "commit": code.get("commit"),
        "uncommitted_changes": code.get("uncommitted_changes"),
        "hardware": {name: facts[name] for name in ("cpu", "cores", "machine")},
        "versions": {**{name: facts[name] for name in ("python", "torch", "transformers")}, **peers},
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "load_at_start": load_at_start,
        "load_at_end": load(),
        "targets": targets(sets, training),
        "sets": sets,
        "training": training,
    }
    for target in content["targets"]:
        print(f"{target['reached']!s:5} {target['value']!s:>12}  {target['figure']} ({target['on']})")
    if options.output:
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
