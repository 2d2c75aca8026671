"""The facts beside a benchmark's figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.recording import write_result

ROOT = Path(__file__).resolve().parents[3]

BENCHMARK = """
from pathlib import Path
from tests.benchmarks.recording import Recording, argument_parser

parser = argument_parser("what it does")
parser.add_argument("--peers", type=Path)
options = parser.parse_args()
Recording("numpy", hidden={options.peers: "FOLDER"}).write(options.output, {"cases": {"one": 1.5}})
"""


def run(folder: Path, *arguments: str) -> None:
    (folder / "a_benchmark.py").write_text(BENCHMARK)
    environment = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-m", "a_benchmark", *arguments], env=environment, cwd=ROOT, check=True)


def test_a_result_has_facts_and_figures(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run(tmp_path, "--peers", str(tmp_path), "--output", str(out))
    found = json.loads(out.read_text())
    assert found["command"] == f"python -m a_benchmark --peers FOLDER --output {out}"
    assert found["cases"] == {"one": 1.5}
    assert set(found["hardware"]) == {"cpu", "cores", "machine"}
    assert {"python", "torch", "numpy", "lock"} <= set(found["versions"])
    assert found["threads"] == 3
    assert set(found["load"]) == {"at_start", "at_end"}
    assert found["date"].endswith("+00:00")


def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == []


def test_the_data_folder_is_no_part_of_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_DATA", "/some/machine/data")
    write_result(tmp_path / "result.json", {"source": "/some/machine/data/chat/chat.jsonl"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"source": "${POSTTRAIN_DATA}/chat/chat.jsonl"}
