"""What keeping lineage costs a run, in seconds a step.

    python -m tests.benchmarks.lineage --output tests/benchmarks/results/lineage.json

In a clean clone of the checkout's commit, and in one with a changed and an untracked file: the code's state and patch,
the environment, the list of source files, hardware, the manifest's digest, and holding the inputs, each timed in fresh
processes, as a flow's steps are. Beside them, the trace of a chain of 1000 results.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.recording import Recording, argument_parser

ROOT = Path(__file__).resolve().parents[2]
_TIMED = "import json; from tests.benchmarks.lineage import parts; print(json.dumps(parts()))"
_GRAPH = 1000


def parts() -> dict[str, float]:
    """Seconds of each part, the first time in this process."""
    from posttrain_lib.lineage.environment import describe_hardware, environment_digest
    from posttrain_lib.lineage.kept import keep_code, keep_environment, keep_sources
    from posttrain_lib.lineage.source_digest import source_digest
    from posttrain_lib.lineage.store import Store, manifest_digest
    from posttrain_lib.schema.manifests import StepManifest

    manifest = StepManifest.from_dict(_plain_manifest())
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        environment_digest()  # a content key needs it anyway, and the next
        source = source_digest("steps.train")

        def hold() -> None:
            with store.reading([("train", str(number)) for number in range(5)]):
                pass

        works: dict[str, Callable[[], Any]] = {
            "code and patch": lambda: keep_code(store),
            "environment": lambda: keep_environment(store),
            "source files": lambda: keep_sources(store, source, "steps.train", []),
            "hardware": describe_hardware,
            "digest of the manifest": lambda: manifest_digest(manifest),
            "holding five inputs": hold,
        }
        return {name: _seconds(work) for name, work in works.items()}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plain_manifest() -> dict[str, Any]:
    """Of a step with many figures."""
    from posttrain_lib.schema.manifests import FORMAT_VERSION

    refs = {str(number): {"uri": "somewhere", "kind": "rows", "digest": "0" * 64} for number in range(10)}
    empty: dict[str, Any] = {name: {} for name in ("key_parts", "environment", "code")}
    metrics = {str(number): number / 7 for number in range(100)}
    known = {"step": "train", "version": 1, "key": "k", "config": metrics, "metrics": metrics, "checks": []}
    times = {"started_at": "2026-01-01", "seconds": 1.0, "hardware": {}, "format_version": FORMAT_VERSION}
    return {**empty, **known, **times, "inputs": refs, "outputs": refs}


def in_checkout(repeats: int, *, changed: bool) -> dict[str, float]:
    """Median seconds of each part over fresh processes, in a clone of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        if changed:
            (clone / "new.py").write_text("x = 1\n" * 200)
            with open(clone / "README.md", "a") as handle:
                handle.write("A line.\n" * 200)
        environment = {**os.environ, "PYTHONPATH": str(clone)}
        found = []
        for _ in range(repeats):
            command = [sys.executable, "-c", _TIMED]
            done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    medians = {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
    return {**medians, "in all": round(statistics.median(sum(each.values()) for each in found), 4)}


def tracing(results: int) -> dict[str, float]:
    """Seconds to trace and draw a chain of that many results, each of five files."""
    from posttrain_lib.lineage.graph import DEPTH, HERE, Raw, trace
    from posttrain_lib.lineage.picture import picture
    from posttrain_lib.lineage.store import Store
    from posttrain_lib.lineage.tree import tree
    from posttrain_lib.schema.manifests import StepManifest

    with tempfile.TemporaryDirectory() as folder:
        store, before = Store(Path(folder)), {"uri": str(Path(folder) / "raw"), "kind": "rows", "digest": "0" * 64}
        for number in range(results):
            key = f"{number:064x}"
            ref = {"uri": str(store.result_folder("train", key) / "0"), "kind": "rows", "digest": key}
            links = {"key": key, "inputs": {"before": before}, "outputs": {"made": ref}}
            with store.scratch() as out:
                for file in range(5):
                    (out / str(file)).write_text("x")
                last = store.publish(out, StepManifest.from_dict({**_plain_manifest(), **links}))
            before = ref
        start = time.perf_counter()
        graph = trace(store, [last], lambda *_: Raw(HERE))
        traced = time.perf_counter() - start
        assert len(graph.results()) == results
        drawn = _seconds(lambda: picture(graph)) + _seconds(lambda: tree(graph.nearest(DEPTH)))
    return {"trace": round(traced, 3), "picture, and tree of the nearest": round(drawn, 3)}


def main() -> None:
    """Print and, with ``--output``, write the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="processes of each case; the median counts")
    options = parser.parse_args()
    recording = Recording()
    figures: dict[str, Any] = {
        "seconds a step, clean checkout": in_checkout(options.repeats, changed=False),
        "seconds a step, changed checkout": in_checkout(options.repeats, changed=True),
        f"seconds for a chain of {_GRAPH} results": tracing(_GRAPH),
    }
    print(json.dumps(figures, indent=1))
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
