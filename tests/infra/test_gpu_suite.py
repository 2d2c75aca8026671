"""The GPU suite on a CPU: every part runs at small sizes, and a part that fails, hangs or is killed stops no other."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu import attention, ceilings, decode, head, kernels, push, step, vocabulary
from tests.benchmarks.gpu.common import Part, document_lengths, measure, ratio
from tests.benchmarks.gpu.documents import documents_of, packed_rows, padded_batches
from tests.benchmarks.gpu.table import lines

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    module.__name__.rpartition(".")[2]: module
    for module in (ceilings, head, push, decode, step, vocabulary, attention, kernels)
}
#: not on the bare machine
MISSING = ("pydantic", "ray", "verl", "vllm", "metaflow", "datasets", "tensordict", "liger_kernel")


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "infra" / "gpu_suite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_part(record: Path | None = None, seconds: float = 100.0) -> Part:
    return Part(torch.device("cpu"), False, time.monotonic() + seconds, record)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs_at_small_sizes(name: str, tmp_path: Path, suite: ModuleType) -> None:
    part = small_part(tmp_path / "record.jsonl")
    PARTS[name].run(part)
    assert part.cases
    assert not [case for case in part.cases.values() if "error" in case or "skipped" in case]
    kept = suite._read(tmp_path / "record.jsonl")
    assert kept.keys() == part.cases.keys()
    result = {"status": 0, "seconds": 1.0, "cases": kept}
    assert suite.is_good(name, result)
    assert len(list(lines({"parts": {name: result}}))) >= 3
    peers = [entry for case in kept.values() for entry in case.get("times", {}).values()]
    assert all("median_ms" in entry or entry == {"skipped": "not installed"} for entry in peers)
    if name == "step":
        # float32: one model from one set of weights on the same documents, summed in other orders
        losses = [case["losses"] for key, case in kept.items() if "losses" in case and "30%" not in key]
        assert len(losses) >= 4
        assert all(values == pytest.approx(losses[0], rel=1e-5) for values in losses)


def test_the_parts_import_without_what_the_bare_machine_lacks() -> None:
    names = [f"tests.benchmarks.gpu.{name}" for name in PARTS]
    code = (
        "import importlib, json, sys; names, missing = json.loads(sys.argv[1]);"
        "sys.modules.update(dict.fromkeys(missing)); [importlib.import_module(name) for name in names]"
    )
    command = [sys.executable, "-c", code, json.dumps([names, MISSING])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_failing_case_stops_no_other() -> None:
    part = small_part()

    def fails() -> dict[str, Any]:
        raise ValueError("on purpose")

    part.run(iter([("bad", fails), ("good", lambda: {"value": 1})]))
    assert part.cases["bad"]["error"] == "ValueError: on purpose"
    assert "in fails" in part.cases["bad"]["traceback"]
    assert part.cases["good"]["value"] == 1


def test_a_device_that_is_lost_ends_the_part(tmp_path: Path) -> None:
    part = small_part(tmp_path / "record")

    def lost() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError):
        part.run(iter([("bad", lost), ("never", lambda: {})]))
    assert list(part.cases) == ["bad"]


def test_no_case_begins_after_the_deadline() -> None:
    part = small_part(seconds=-1.0)
    part.run(iter([("late", lambda: {"value": 1})]))
    assert part.cases == {"late": {"skipped": "the part's time was over"}}


def test_a_peer_that_fails_leaves_the_others_their_times() -> None:
    def fails(number: int) -> None:
        raise NotImplementedError("not here")

    times = measure(small_part(), {"ours": lambda number: None, "theirs": fails, "absent": None}, rounds=3)
    assert times["theirs"]["error"] == "NotImplementedError: not here"
    assert times["absent"] == {"skipped": "not installed"}
    assert times["ours"]["median_ms"] >= times["ours"]["min_ms"] >= 0
    assert ratio(times, "theirs", "ours") is None
    assert ratio(times, "ours", "ours") == 1.0


CRASH = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps({'case': 'one', 'value': 1}) + '\\n{\"cas'); "


@pytest.mark.parametrize(
    ("ending", "status"),
    [("os._exit(9)", 9), ("os.kill(os.getpid(), 11)", -11), ("import time; time.sleep(600)", "out of time")],
    ids=["exit", "crash", "hang"],
)
def test_what_a_part_measured_outlives_it(
    ending: str, status: int | str, suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(part: str, device: str, seconds: float, record: Path) -> list[str]:
        done = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'case': 'two', 'value': 2}))"
        return [sys.executable, "-c", CRASH + ending if part == "head" else done, str(record)]

    monkeypatch.setattr(suite, "command_of", command)
    monkeypatch.setattr(suite, "GRACE", 0)
    monkeypatch.setattr(suite, "PARTS", {"head": 5, "step": 55})
    suite.run_all(["head", "step"], "cpu", 60 if status == "out of time" else 300, tmp_path)
    result = json.loads((tmp_path / "gpu-suite.json").read_text())
    first, second = result["parts"]["head"], result["parts"]["step"]
    assert (first["status"], first["cases"]) == (status, {"one": {"value": 1}})
    assert "log" in first and not suite.is_good("head", first)
    assert (second["status"], second["cases"]) == (0, {"two": {"value": 2}})
    assert {"command", "date", "commit", "source_sha256", "hardware", "versions"} <= result.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-suite.json", "gpu-suite.log"]


def test_without_time_no_part_begins(suite: ModuleType, tmp_path: Path) -> None:
    result = suite.run_all(["head"], "cpu", 1.0, tmp_path)
    assert result["parts"]["head"]["status"] == "no time left"


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_the_whole_command(tmp_path: Path) -> None:
    """With what the bare machine lacks missing in every process that it starts."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({MISSING!r}))\n")
    command = [sys.executable, str(ROOT / "infra" / "gpu_suite.py"), "--device", "cpu", "--budget", "1500"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "gpu-suite.json").read_text())
    assert sorted(result["parts"]) == sorted(["tests", *PARTS])
    assert all(part["status"] == 0 for part in result["parts"].values())


def test_documents_fill_a_row_and_keep_their_tokens() -> None:
    lengths = document_lengths(20000, 40, 160)
    assert sum(lengths) == 20000 and max(lengths) <= 160 and min(lengths) >= 1
    documents = documents_of(lengths, 97)
    rows = packed_rows(documents, 512, 3)
    assert len(rows) == 3
    for row in rows:
        bounds = row.cu_seqlens
        assert bounds[-1] == row.num_tokens == 512
        for number, begin, end in zip(row.document_ids, bounds[:-1], bounds[1:], strict=True):
            if number >= 0:
                assert (row.token_ids[begin:end] == documents[number]).all()
                assert (row.target_ids[begin : end - 1] == documents[number][1:]).all()
                assert row.loss_weights[begin:end].tolist() == [1.0] * (end - begin - 1) + [0.0]
            else:
                assert not row.loss_weights[begin:end].any()
        assert row.real_tokens == sum(len(documents[number]) for number in row.document_ids if number >= 0)


def test_padded_batches_hold_the_documents() -> None:
    documents = documents_of([3, 7, 2], 11)
    (ids, mask), (last, _) = padded_batches(documents, 2)
    assert ids.shape == mask.shape == (2, 7) and last.shape == (1, 2)
    assert [ids[place][mask[place] == 1].tolist() for place in range(2)] == [item.tolist() for item in documents[:2]]
