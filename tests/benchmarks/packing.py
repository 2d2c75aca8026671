"""Packing beside its peers, in one run: fill, rates, waste, delays, ranks, first batch, and what training gains by it.

    ./infra/env pip install --no-deps --target FOLDER -r infra/locks/peers.txt
    ./infra/env python -m tests.benchmarks.packing --peers FOLDER --output tests/benchmarks/results/packing.json

Ours is the whole way: a finished token store, StoreFeed, PackedLoader, batches with all their arrays. TRL gets the same
documents ready in an Arrow table and gives one back (``pack_dataset(..., "bfd")``); its collator, which makes tensors
of the rows, is measured apart. grain streams from arrays in memory into arrays. Rates count tokens of documents, by the
wall and by the processor's time (which other work on the machine disturbs less): medians of interleaved rounds. A peer
that cannot be imported has null figures, and no ratio is given. One thread each; ``background`` is a thread more.
Sets of 1 M documents are planned from their lengths alone unless ``--million`` asks for their arrays.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import argparse
import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.planner import Planner
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore
from tests.benchmarks.packing_data import (
    HEAVY_TAILED,
    LOG_NORMAL,
    SEED,
    SHORTEST,
    LengthsFeed,
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
from tests.benchmarks.recording import Recording, argument_parser, load

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("POSTTRAIN_DATA") or ROOT.parent / "shared" / "data")
BUFFERS = (64, 256, 1024)
#: rows of a step: eight ranks of eight; of the conversations, of which 64 would be more than half: eight
ROWS_PER_STEP, CHAT_ROWS_PER_STEP = 64, 8
#: rows of one forward
MICRO_BATCH_ROWS = 16
ROUNDS = 5
#: a multiple of 1,024 that takes the longest real conversation
CHAT_ROW_TOKENS = 12288
#: documents that grain packs in a round: it is slow, and its rate does not depend on their number
GRAIN_DOCUMENTS = 2000
COLLATED_ROWS = 60
MILLION = 1_000_000
GRAIN_BINS = (8, 64)
CLOCKS = ("tokens_per_second_M", "tokens_per_processor_second_M")
TRL, TRL_ONE_BATCH = "trl, batches of 1000 (default)", "trl, one batch"
TRL_COLLATOR, TRL_ARRAYS = "trl's collator alone", "trl, batches of 1000, then its collator"


@dataclass(frozen=True)
class Case:
    """A set and how it is packed."""

    store: TokenStore
    row_tokens: int
    rows_per_step: int

    def feed(self, epochs: float | None = 1) -> StoreFeed:
        """Its documents in order."""
        return StoreFeed(self.store, row_tokens=self.row_tokens, seed=SEED, epochs=epochs)

    def loader(self, buffer: int, background: bool = False) -> PackedLoader:
        """One epoch's steps."""
        return PackedLoader(
            self.feed(),
            row_tokens=self.row_tokens,
            rows_per_step=self.rows_per_step,
            micro_batch_rows=min(MICRO_BATCH_ROWS, self.rows_per_step),
            packing_buffer=buffer,
            background=background,
        )


def run_ours(case: Case, buffer: int, background: bool) -> int:
    """Tokens of a whole epoch; each step is dropped as the next one comes."""
    with case.loader(buffer, background) as loader:
        return sum(step.real_tokens for step in loader)


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


def planned(
    lengths: np.ndarray, make_feed: Callable[[], Any], row_tokens: int, rows_per_step: int, buffer: int
) -> dict[str, Any]:
    """Fill, waste by cause and delays, from the planner's rows and how far it had read the order before each."""
    order, feed = order_of(make_feed()), make_feed()
    planner = Planner(feed, row_tokens=row_tokens, packing_buffer=buffer)
    rows: list[Any] = []
    taken_list: list[int] = []
    while made := list(planner.rows(1, 1 + len(rows) // rows_per_step)):
        rows += made
        at = feed.mixer.state()["streams"][0]
        taken_list.append(at["epoch"] * len(lengths) + at["cursor"])
    taken, sizes = np.array(taken_list), np.array([len(row) for row in rows])
    flat = np.concatenate([np.asarray(row, np.int64) for row in rows])
    used = np.add.reduceat(lengths[flat], np.cumsum(sizes) - sizes, dtype=np.int64)
    free, slots, late = row_tokens - used, len(rows) * row_tokens, delays(order, rows, taken)
    if late.min() < 0 or late.max() > buffer:
        raise SystemExit(f"packing: delays of {late.min()} to {late.max()} rows, bound {buffer}")
    flushed = taken == len(lengths)  # nothing more comes: made of what waits
    steady = (taken - (np.cumsum(sizes) - sizes) >= buffer) & ~flushed
    return {
        "packing_buffer": buffer,
        "fill": round(float(used.sum() / slots), 5),
        "fill_steady": round(float(used[steady].mean() / row_tokens), 5) if steady.any() else None,
        "rows": len(rows),
        "waste_share_of_slots": {
            "row_ends_while_the_look_ahead_grows": round(float(free[~steady & ~flushed].sum() / slots), 6),
            "row_ends_steady": round(float(free[steady].sum() / slots), 6),
            "final_flush": round(float(free[flushed].sum() / slots), 6),
            "truncated_tokens": int(lengths.sum(dtype=np.int64) - used.sum()),
            "documents_refused": len(lengths) - len(flat),
        },
        "multiset_preserved": bool((np.bincount(flat, minlength=len(lengths)) == 1).all()),
        "delay_rows": {"bound": buffer, "largest": int(late.max()), "median": int(np.median(late))},
        "planning_documents_per_second_M": planning_rate(make_feed(), len(lengths), row_tokens, rows_per_step, buffer),
    }


def planning_rate(feed: Any, documents: int, row_tokens: int, rows_per_step: int, buffer: int) -> float:
    """Millions of documents a second, step by step, the order of the epoch made before."""
    planner, step = Planner(feed, row_tokens=row_tokens, packing_buffer=buffer), 1
    begun = time.perf_counter()
    while len(planner.rows(rows_per_step, step)):
        step += 1
    return round(documents / (time.perf_counter() - begun) / 1e6, 3)


def verify_ours(case: Case, buffer: int, sums: np.ndarray) -> bool:
    """Whether the loader's arrays hold every document once, whole, and the planned tokens and nothing else."""
    store = case.store
    seen, right = np.zeros(len(store), np.int64), True
    with case.loader(buffer) as loader:
        for batch in (batch for step in loader for batch in step.micro_batches):
            real = batch.document_ids >= 0
            examples = batch.document_ids[real]
            np.add.at(seen, examples, 1)
            found = np.add.reduceat(batch.token_ids, batch.cu_seqlens[:-1], dtype=np.int64)[real]
            right &= np.array_equal(found, sums[examples])
            right &= np.array_equal(np.diff(batch.cu_seqlens)[real], store.lengths[examples])
    return bool(right and (seen == 1).all())


def first_batches(case: Case) -> dict[str, float]:
    """Milliseconds from before StoreFeed and PackedLoader are made to the first step, median, of several kinds."""
    store = case.store

    def measure(opened: Callable[[], TokenStore], rows: int) -> float:
        times = []
        for _ in range(ROUNDS):
            held = opened()
            begun = time.perf_counter()
            one_step(held, case.row_tokens, rows)
            times.append(1e3 * (time.perf_counter() - begun))
        return round(statistics.median(times), 2)

    command = [sys.executable, "-m", "tests.benchmarks.packing", "--first-batch", str(store.folder)]
    fresh = subprocess.run(
        [*command, str(case.row_tokens)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {
        "8_rows": measure(lambda: store, 8),
        "64_rows": measure(lambda: store, 64),
        # A shard is compared with its digest when it is first read: here those that the first rows touch.
        "8_rows_store_just_opened": measure(lambda: TokenStore(store.folder), 8),
        # The store is open and its shards checked, nothing is packed yet: the compiled loops are loaded within.
        "8_rows_fresh_process": round(float(fresh), 2),
    }


def one_step(store: TokenStore, row_tokens: int, rows: int) -> None:
    feed = StoreFeed(store, row_tokens=row_tokens, seed=SEED)
    with PackedLoader(feed, row_tokens=row_tokens, rows_per_step=rows) as loader:
        loader.next_step()


def first_batch_here(folder: str, row_tokens: int) -> None:
    """Print the milliseconds to the first step of this process."""
    store = TokenStore(folder)
    for _ in store.shards_of(np.arange(len(store))):
        pass
    begun = time.perf_counter()
    one_step(store, row_tokens, 8)
    print(1e3 * (time.perf_counter() - begun))


def measure_set(case: Case, peers: dict[str, str | None], rounds: int) -> dict[str, Any]:
    """All figures of one set but training's. ``rounds`` of 1: a set so large that TRL's single batch is left out."""
    store, row_tokens = case.store, case.row_tokens
    sums = checksums(store)
    run_ours(case, BUFFERS[0], False)  # maps the files, loads the compiled loops
    result: dict[str, Any] = {
        "row_tokens": row_tokens,
        "rows_per_step": case.rows_per_step,
        "lengths": statistics_of(store.lengths, row_tokens),
        "ours": {
            f"buffer {buffer}": planned(store.lengths, case.feed, row_tokens, case.rows_per_step, buffer)
            for buffer in BUFFERS
        },
    }
    for buffer in BUFFERS:
        found = result["ours"][f"buffer {buffer}"]
        found["arrays_hold_every_document_once"] = verify_ours(case, buffer, sums)
    timings, fills, amounts = take_turns(case, peers, sums, rounds)
    for name in (f"buffer {buffer}" for buffer in BUFFERS):
        result["ours"][name].update(timings.rate(name, store.total_tokens) or {})
    result["ours"]["buffer 256, background"] = timings.rate("buffer 256, background", store.total_tokens)
    result["peers"] = {}
    for name in (TRL, TRL_ONE_BATCH, TRL_COLLATOR, *(f"grain, {bins} bins" for bins in GRAIN_BINS)):
        rate = timings.rate(name, amounts.get(name, 0))
        result["peers"][name] = rate and {"fill": fills.get(name), "tokens": amounts[name], **rate}
    result["peers"][TRL_ARRAYS] = one_after_the_other(result["peers"][TRL], result["peers"][TRL_COLLATOR])
    result["ratios_of_buffer_256"] = ratios(result)
    result["first_batch_ms"] = first_batches(case)
    return result


def take_turns(
    case: Case, peers: dict[str, str | None], sums: np.ndarray, rounds: int
) -> tuple[Timings, dict[str, float], dict[str, int]]:
    """The timed rounds: (seconds, fill of each peer, tokens that each run of a peer handles)."""
    store, row_tokens = case.store, case.row_tokens
    timings, fills, amounts = Timings(), dict[str, float](), dict[str, int]()
    dataset = arrow_dataset(store) if peers["trl"] else None
    collator = TrlCollator() if peers["trl"] else None
    sizes = {TRL: 1000, **({TRL_ONE_BATCH: len(store)} if rounds > 1 else {})}
    sample = np.random.default_rng(SEED).permutation(len(store))[:GRAIN_DOCUMENTS]
    for number in range(rounds):
        for buffer in BUFFERS:
            timings.time(f"buffer {buffer}", partial(run_ours, case, buffer, False))
        timings.time("buffer 256, background", partial(run_ours, case, 256, True))
        for name, size in sizes.items() if dataset is not None else ():
            packed = timings.time(name, partial(trl_pack, dataset, row_tokens, size))
            amounts[name] = store.total_tokens
            if number == 0:
                fills[name] = round(check_trl(packed, store.lengths, sums, row_tokens), 5)
            if name == TRL and collator is not None:
                amounts[TRL_COLLATOR] = timings.time(TRL_COLLATOR, partial(collator.run, packed, COLLATED_ROWS))
            del packed
        for bins in GRAIN_BINS if peers["grain"] else ():
            name = f"grain, {bins} bins"
            amounts[name], rows = timings.time(name, partial(grain_pack, store, sample, row_tokens, bins))
            fills[name] = round(amounts[name] / rows / row_tokens, 5)
        print(f"  round {number + 1} of {rounds}, load {load()}", flush=True)
    return timings, fills, amounts


def one_after_the_other(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    """The rate of two passes over the same tokens."""
    if first is None or then is None:
        return None
    return {"fill": first["fill"], **{clock: round(1 / (1 / first[clock] + 1 / then[clock]), 3) for clock in CLOCKS}}


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Ours at a buffer of 256 over each peer, by the wall and by processor time; null without the peer."""
    ours = result["ours"]["buffer 256"]
    return {
        name: peer and {clock: round(ours[clock] / peer[clock], 2) for clock in CLOCKS}
        for name, peer in result["peers"].items()
    }


def measure_lengths(lengths: np.ndarray, row_tokens: int) -> dict[str, Any]:
    """Fill, waste and delays of a set of lengths, planned as the loader plans; no tokens, no arrays, no peers."""
    make_feed = partial(LengthsFeed, lengths)
    return {
        "row_tokens": row_tokens,
        "rows_per_step": ROWS_PER_STEP,
        "lengths": statistics_of(lengths, row_tokens),
        "planned_from_lengths_alone": True,
        "ours": {
            f"buffer {buffer}": planned(lengths, make_feed, row_tokens, ROWS_PER_STEP, buffer) for buffer in BUFFERS
        },
    }


def qwen3_pair_cost() -> float:
    from posttrain_lib.models.families import spec_from_folder
    from posttrain_lib.training.flops import relative_pair_cost

    return relative_pair_cost(spec_from_folder(DATA / "model_configs" / "qwen3-0.6b"))


def with_ranks(found: dict[str, Any], case: Case) -> dict[str, Any]:
    """Adds the imbalance of eight ranks."""
    cost, tokens = qwen3_pair_cost(), case.row_tokens
    by_rows = [
        rank_imbalance(case.feed(None), row_tokens=tokens, packing_buffer=256, pair_cost=cost, rows_each=rows_each)
        for rows_each in ROWS_EACH
    ]
    cost_text = f"row tokens + {cost:.3e} for a query-key pair (Qwen3-0.6B)"
    return {**found, "rank_imbalance": {"modelled_cost": cost_text, "by_rows": by_rows}}


def targets(sets: dict[str, Any], training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Every figure to reach, what was reached, and whether it is enough; null where it was not measured."""
    found: list[dict[str, Any]] = []

    def add(on: str, what: str, value: float | None, at_least: float | None = None, at_most: float = 0.0) -> None:
        reached = None
        if value is not None:
            reached = value >= at_least if at_least is not None else value <= at_most
        found.append({"on": on, "figure": what, "value": value, "to_reach": at_least or at_most, "reached": reached})

    for name, values in sets.items():
        measured = "ratios_of_buffer_256" in values
        for buffer in BUFFERS:
            for kind in ("fill", "fill_steady"):
                least = 0.995 if values["row_tokens"] == LOG_NORMAL.cap else 0.99
                add(name, f"{kind}, buffer {buffer}", values["ours"][f"buffer {buffer}"][kind], least)
        for peer, least in ((TRL, 10), (TRL_ARRAYS, 10), ("grain, 8 bins", 100), ("grain, 64 bins", 100)):
            if not measured:
                continue
            ratio = values.get("ratios_of_buffer_256", {}).get(peer)
            for clock in CLOCKS:
                add(name, f"times {peer}, {clock}", ratio and ratio[clock], least)
        for what, value in values.get("first_batch_ms", {}).items():
            add(name, f"first batch, ms: {what}", value, at_most=50)
        for ranks in values.get("rank_imbalance", {}).get("by_rows", ()):
            for kind in ("mean", "max"):
                what = f"imbalance, {ranks['rows_per_rank']} rows a rank, {kind} over steps"
                add(name, what, ranks["modelled"]["dealt"][kind], at_most=1.02)
    if training is not None:
        add("training", "share of the step waited for data", training["data_wait_share"], at_most=0.01)
        for name, gain in training["gain_over"].items():
            add("training", f"gain over '{name}'", gain, 4.7)
    return found


def run_sets(options: argparse.Namespace, peers: dict[str, str | None], scratch: Path) -> tuple[dict[str, Any], Any]:
    """Every set, then training on the real one: (figures by set, those of training or None)."""
    sets: dict[str, Any] = {}
    for documents, rounds in ((options.documents, options.rounds), (MILLION, 1)):
        for law in (LOG_NORMAL, HEAVY_TAILED):
            name, folder = f"{law.name}, {documents:,} documents", scratch / f"{law.name}-{documents}"
            print(f"{name} (load {load()})", flush=True)
            described, lengths = {"law": law.law, "shortest": SHORTEST, "seed": SEED}, law.lengths(documents)
            if rounds == 1 and not options.million:
                sets[name] = {**described, **measure_lengths(lengths, law.cap)}
                continue
            case = Case(generated_store(folder, lengths), law.cap, ROWS_PER_STEP)
            sets[name] = with_ranks({**described, **measure_set(case, peers, rounds)}, case)
            shutil.rmtree(folder)
    if not DATA.is_dir():
        print(f"no real data at {DATA} (POSTTRAIN_DATA names another folder): no real set, no training")
        return sets, None
    print(f"chat (load {load()})", flush=True)
    documents_of_set, _ = chat_documents(DATA)
    pairs = ((tokens, np.ones(len(tokens), np.float32)) for tokens in documents_of_set)
    case = Case(written_store(scratch / "chat", pairs), CHAT_ROW_TOKENS, CHAT_ROWS_PER_STEP)
    sets["chat"] = with_ranks(measure_set(case, peers, options.rounds), case)
    if not options.train_on_one_in:
        return sets, None
    from tests.benchmarks.packing_training import compare_training

    print(f"training (load {load()})", flush=True)
    settings = {"row_tokens": CHAT_ROW_TOKENS, "every": options.train_on_one_in, "packing_buffer": 256}
    return sets, compare_training(documents_of_set, scratch / "sample", rounds=options.rounds, **settings)


def main() -> None:
    """All sets, then training."""
    parser = argument_parser(__doc__)
    parser.add_argument("--peers", type=Path, help="folder with the packages of infra/locks/peers.txt")
    parser.add_argument("--documents", type=int, default=50_000, help="documents of the generated sets")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--million", action="store_true", help="build the arrays of the sets of 1 M documents too")
    parser.add_argument("--train-on-one-in", type=int, default=16, help="share of the conversations; 0: no training")
    parser.add_argument("--scratch", type=Path, help="where stores go for the time of the run")
    parser.add_argument("--first-batch", nargs=2, metavar=("STORE", "ROW_TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        first_batch_here(options.first_batch[0], int(options.first_batch[1]))
        return
    recording = Recording(hidden={options.peers: "FOLDER", options.scratch: "SCRATCH"})
    peers = find_peers(options.peers)
    for name in (name for name, version in peers.items() if version is None):
        print(f"{name} cannot be imported: its column is null and no ratio is given")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sets, training = run_sets(options, peers, Path(scratch))
    reached = targets(sets, training)
    for target in reached:
        of = f"{target['value']!s:>10} of {target['to_reach']!s:5}"
        print(f"{target['reached']!s:5} {of} {target['on']}: {target['figure']}")
    figures = {"peers": peers, "targets": reached, "sets": sets, "training": training}
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
