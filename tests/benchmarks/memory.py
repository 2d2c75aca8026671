"""Resident memory of reading rows, as the data grows twentyfold:

    python -m tests.benchmarks.memory --output tests/benchmarks/results/memory.json

Each case is read from end to end by a fresh process; kept are its peak (VmHWM), what of it is there before the first
row is read, and the ratio of the peaks. The S3 server is moto's, in a process of its own.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.recording import Recording, argument_parser
from tests.support.s3 import s3_client, s3_process

ROOT = Path(__file__).resolve().parents[2]
FACTOR = 20
WORDS = ["".join(random.Random(seed).choices("aeioubcdlmnrst", k=3 + seed % 7)) for seed in range(5000)]

READ = """
import json, sys
from pathlib import Path
import fsspec, pyarrow.parquet
from posttrain_lib.data.sources import iter_rows
def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
if sys.argv[1].startswith("s3:"):
    fsspec.filesystem("s3")  # its client is no data either
before, rows = peak_mib(), sum(1 for _ in iter_rows(sys.argv[1]))
print(json.dumps({"rows": rows, "before_mib": round(before, 1), "peak_mib": round(peak_mib(), 1)}))
"""


@functools.cache
def conversations() -> list[dict[str, Any]]:
    """Chat rows, about 4 MB of text: longer than any window in which a compressor would see them again."""
    generator = random.Random(0)
    rows = []
    for _ in range(4000):
        text = " ".join(generator.choices(WORDS, k=max(2, min(4000, int(generator.lognormvariate(4.5, 1.0))))))
        half = len(text) // 2
        turns = [("user", text[:half]), ("assistant", text[half:])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write(path: Path, size: int) -> None:
    """A file of the kind that its name tells: the conversations over and over, about ``size`` bytes uncompressed."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in conversations())
    times = max(1, round(size / len(lines)))
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.concat_tables([pa.Table.from_pylist(conversations())] * times)
        grouped = table.num_rows if "one-group" in path.name else 1000
        parquet.write_table(table, path, row_group_size=grouped, use_dictionary=False)
        return
    with path.open("wb") as file:
        packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) if path.suffix == ".gz" else None
        for _ in range(times):
            (packed or file).write(lines)
        if packed:
            packed.close()


def peak(path: str, endpoint: str) -> dict[str, float]:
    """What a fresh process says of itself."""
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-c", READ, path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(megabytes: int) -> dict[str, Any]:
    """Every case at 1x and 20x."""
    results: dict[str, Any] = {}
    cases = {
        "rows.jsonl.gz": ("local",),
        "rows.parquet": ("local", "s3"),
        "one-group.parquet": ("local", "s3"),
        "rows.jsonl": ("s3",),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server, proxy = stack.enter_context(s3_process())
        client = s3_client(server)
        client.mkdir("rows")
        for times in (1, FACTOR):
            for name, places in cases.items():
                path = folder / f"{times}x-{name}"
                write(path, times * megabytes * 1_000_000)
                for kind in places:
                    where = str(path) if kind == "local" else f"s3://rows/{path.name}"
                    if kind == "s3":
                        client.put(str(path), f"rows/{path.name}")
                    found = {"file_mb": round(path.stat().st_size / 1e6, 1), **peak(where, proxy)}
                    results.setdefault(f"{kind} {name}", {})[f"{times}x"] = found
                    print(f"{kind:6}{name:20}{times:3}x {found}", flush=True)
                    if kind == "s3":
                        client.rm(f"rows/{path.name}")
                path.unlink()
    for case in results.values():
        case["ratio_of_peaks"] = round(case[f"{FACTOR}x"]["peak_mib"] / case["1x"]["peak_mib"], 3)
    return results


def main() -> None:
    """All cases, a few minutes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=20, help="uncompressed, at 1x")
    options = parser.parse_args()
    recording = Recording("pyarrow", "fsspec", "s3fs", "moto")
    results = measure(options.megabytes)
    for name, case in results.items():
        print(
            f"{name:28} {case['1x']['peak_mib']:8} -> {case[f'{FACTOR}x']['peak_mib']:8} MiB  x{case['ratio_of_peaks']}"
        )
    recording.write(options.output, {"uncompressed_mb_at_1x": options.megabytes, "cases": results})


if __name__ == "__main__":
    main()
