"""Rates of reading an S3 object behind latency, beside one plain parallel download of it, in one run:

    python -m tests.benchmarks.remote_read --output tests/benchmarks/results/remote_read.json

The server (moto's) and the proxy before it, which adds the latency and caps the bandwidth, are a process of their own.
The download asks for 4 MiB ranges on eight connections and throws the bytes away. Peers take turns within each round;
kept are medians. The cap lies below what one core parses, or the parser would be measured.
"""

from __future__ import annotations

import http.client
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain_lib.data.remote import RemoteFile, RemoteObject
from posttrain_lib.data.sources import read_from
from tests.benchmarks.memory import write
from tests.benchmarks.recording import Recording, argument_parser
from tests.support.s3 import s3_client, s3_environment, s3_process

RANGE = 4 << 20
CONNECTIONS = 8
NAMES = ("rows.jsonl", "rows.jsonl.gz", "rows.parquet")


def download(proxy: str, key: str, size: int) -> None:
    """All bytes of an object on several connections."""

    def fetch(start: int) -> int:
        connection = http.client.HTTPConnection(urlsplit(proxy).netloc)
        headers = {"Range": f"bytes={start}-{min(start + RANGE, size) - 1}"}
        connection.request("GET", f"/{key}", headers=headers)
        got = len(connection.getresponse().read())
        connection.close()
        return got

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        got = sum(pool.map(fetch, range(0, size, RANGE)))
    assert got == size, f"{got} bytes of {size}"


def read_bytes(url: str) -> None:
    """All bytes, by the reader that rows are read with."""
    with RemoteFile(RemoteObject(url)) as handle:
        buffered = io.BufferedReader(handle, 1 << 18)
        while buffered.read1(1 << 18):
            pass


def read_rows(url: str, first: list[float]) -> None:
    """All rows; the time of the first is kept."""
    start = time.perf_counter()
    rows = read_from(url)
    next(rows)
    first.append(time.perf_counter() - start)
    for _ in rows:
        pass


def measure(megabytes: int, latency: float, rate: float, rounds: int) -> dict[str, Any]:
    """Cases -> megabytes of the file per second, share of the download's, first row."""
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_process(latency, rate) as (server, proxy),
        s3_environment(proxy),
    ):
        client = s3_client(server)
        client.mkdir("rows")
        for name in NAMES:
            path = Path(folder) / name
            write(path, megabytes * 1_000_000 * (2 if name.endswith(".gz") else 1))
            client.put(str(path), f"rows/{name}")
            size, first = path.stat().st_size, list[float]()
            key, url = f"rows/{name}", f"s3://rows/{name}"
            peers: dict[str, Callable[[], None]] = {
                "download": lambda key=key, size=size: download(proxy, key, size),  # type: ignore[misc]
                "bytes": lambda url=url: read_bytes(url),  # type: ignore[misc]
                "rows": lambda url=url, first=first: read_rows(url, first),  # type: ignore[misc]
            }
            read_bytes(url)  # signed; the proxy then has the object
            times: dict[str, list[float]] = {peer: [] for peer in peers}
            for _ in range(rounds):
                for peer, run in peers.items():
                    start = time.perf_counter()
                    run()
                    times[peer].append(time.perf_counter() - start)
            medians = {peer: statistics.median(found) for peer, found in times.items()}
            results[name] = {
                "file_mb": round(size / 1e6, 1),
                **{f"{peer}_mb_per_second": round(size / 1e6 / median, 1) for peer, median in medians.items()},
                "bytes_share_of_download": round(medians["download"] / medians["bytes"], 3),
                "rows_share_of_download": round(medians["download"] / medians["rows"], 3),
                "first_row_seconds": round(statistics.median(first), 3),
            }
            print(name, results[name], flush=True)
    return results


def main() -> None:
    """All cases, a few minutes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=24, help="size of each file, about")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=8e6, help="bytes per second of all connections together")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    recording = Recording("pyarrow", "fsspec", "s3fs", "moto")
    results = measure(options.megabytes, options.latency, options.rate, options.rounds)
    recording.write(
        options.output,
        {
            "latency_seconds": options.latency,
            "cap_mb_per_second": options.rate / 1e6,
            "rounds": options.rounds,
            "cases": results,
        },
    )


if __name__ == "__main__":
    main()
