"""Time to the first packed batch of a run that tokenises on the fly from a cold object store behind latency:

    python -m tests.benchmarks.live_s3 --output tests/benchmarks/results/live_s3.json

The server (moto's) and the proxy before it, which adds the latency, are a process of their own. Rows are generated
conversations in gzipped JSON lines. The tokenizer and the compiled kernels are loaded before the clock starts, as in
a run: while the model is being loaded. Every round is a process of its own, so that nothing is cached.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data import kernels, live_rows
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.fingerprint import fingerprint
from posttrain_lib.data.live_feed import LiveFeed, LiveSpec
from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.sources import list_files, read_from
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.lineage.digests import FileDigests
from tests.benchmarks.recording import Recording, argument_parser
from tests.support.s3 import s3_client, s3_environment, s3_process

ROW_TOKENS, ROWS_PER_STEP, WINDOW, BUFFER = 1024, 8, 10_000, 256
SHARDS, ROWS_PER_SHARD = 4, 5000
PATH = "s3://cold/*.jsonl.gz"


def one_round(url: str, tokenizer: Path, workers: int) -> dict[str, float]:
    """Seconds from the start of reading to the first row and to the first step; and steps after it, per second."""
    seen: list[float] = []

    def noted(file: str, place: Any, name: str | None = None) -> Any:
        for row in read_from(file, place, name):
            seen.append(time.perf_counter())
            yield row

    live_rows.read_from = noted  # type: ignore[assignment]
    with s3_environment(url):
        config = DataConfig.model_validate({"sources": [{"name": "cold", "path": PATH}], "max_example_tokens": 1024})
        files = (tuple(list_files(PATH, FileDigests())),)
        spec = LiveSpec(config, str(tokenizer), files, fingerprint(ChatTokenizer(tokenizer)))
        feed = LiveFeed(spec, row_tokens=ROW_TOKENS, window=WINDOW, workers=workers)
        with PackedLoader(feed, row_tokens=ROW_TOKENS, rows_per_step=ROWS_PER_STEP, packing_buffer=BUFFER) as loader:
            feed.warm(wait=True)
            kernels.warm()  # waits for what the loader began
            begun = time.perf_counter()
            loader.next_step()
            first = time.perf_counter()
            for _ in range(20):
                loader.next_step()
            return {
                "first_row_seconds": seen[0] - begun,
                "first_step_seconds": first - begun,
                "first_step_after_first_row_seconds": first - seen[0],
                "later_steps_per_second": 20 / (time.perf_counter() - first),
            }


def measure(rounds: int, latency: float) -> dict[str, dict[str, float]]:
    """Medians by number of worker processes."""
    found: dict[int, list[dict[str, float]]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, s3_process(latency_seconds=latency) as (server, proxy):
        rows = list(generate_rows(SHARDS * ROWS_PER_SHARD, 0))
        texts = (message["content"] for row in rows[:500] for message in row["messages"])
        build_tokenizer(texts, 768, Path(folder))
        with s3_environment(server):
            client = s3_client(server)
            client.mkdir("cold")
            for shard in range(SHARDS):
                lines = "".join(json.dumps(row) + "\n" for row in rows[shard::SHARDS])
                client.pipe(f"cold/shard-{shard}.jsonl.gz", gzip.compress(lines.encode()))
        for _ in range(rounds):
            for workers in found:
                command = [sys.executable, "-m", "tests.benchmarks.live_s3", "--round", proxy, folder, str(workers)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[workers].append(json.loads(done.stdout))
    return {
        f"{workers} processes": {key: statistics.median(each[key] for each in results) for key in results[0]}
        for workers, results in found.items()
    }


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds added to every request")
    parser.add_argument("--round", nargs=3, metavar=("PROXY", "TOKENIZER", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    recording = Recording()
    if options.round:
        proxy, tokenizer, workers = options.round
        print(json.dumps(one_round(proxy, Path(tokenizer), int(workers))))
        return
    settings = {
        "latency_seconds": options.latency,
        "rounds": options.rounds,
        "row_tokens": ROW_TOKENS,
        "rows_per_step": ROWS_PER_STEP,
        "packing_buffer": BUFFER,
        "shuffle_window": WINDOW,
    }
    medians = measure(options.rounds, options.latency)
    print(json.dumps(medians, indent=1))
    recording.write(options.output, {"settings": settings, "medians": medians})


if __name__ == "__main__":
    main()
