"""lm-evaluation-harness: what is said where it is missing, and what its results become.

RESULTS is written by hand in the shape of its version 0.4.13 (``results``, ``higher_is_better``, ``n-samples``), with
invented figures; it is not recorded from a run. The process is started for real, on a stand-in that answers in that
shape: the harness is not among the locked packages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import lm_eval_process
from posttrain_lib.errors import ConfigError, VerificationError

RESULTS: dict[str, Any] = {
    "results": {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 75,
            "acc,none": 0.25,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.3,
            "acc_norm_stderr,none": 0.04,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.1,
            "exact_match_stderr,strict-match": 0.02,
            "exact_match,flexible-extract": 0.2,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.5, "word_perplexity_stderr,none": "N/A"},
    },
    "higher_is_better": {
        "arc_easy": {"acc": True, "acc_norm": True},
        "gsm8k": {"exact_match": True},
        "wikitext": {"word_perplexity": False},
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 75}, "gsm8k": {"original": 1319, "effective": 75}},
    "versions": {"arc_easy": 1.0, "gsm8k": 3.0, "wikitext": 2.0},
    "n-shot": {"arc_easy": 0, "gsm8k": 5, "wikitext": 0},
    "config": {"model": "hf", "limit": 75.0},
}
OPTIONS: dict[str, Any] = {
    "tasks": ("arc_easy", "gsm8k"),
    "include_path": None,
    "limit": 75,
    "num_fewshot": None,
    "batch_size": 4,
    "device": "cpu",
    "apply_chat_template": False,
}
STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--tasks"] == "broken":
    print("no such task: broken")
    sys.exit(3)
folder = pathlib.Path(options["--output_path"]) / "the__model"
folder.mkdir(parents=True)
results = json.loads(pathlib.Path(__file__).with_name("results.json").read_text())
(folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps({**results, "options": options}))
"""


def test_its_figures_become_rows_with_intervals() -> None:
    rows = {(row["task"], row["metric"]): row for row in lm_eval_process.comparison_rows(RESULTS)}
    assert set(rows) == {
        ("lm_eval arc_easy", "acc"), ("lm_eval arc_easy", "acc_norm"), ("lm_eval wikitext", "word_perplexity"),
        ("lm_eval gsm8k", "exact_match (strict-match)"), ("lm_eval gsm8k", "exact_match (flexible-extract)"),
    }  # fmt: skip
    accuracy = rows["lm_eval arc_easy", "acc"]
    low, high = 0.25 - 1.959964 * 0.05, 0.25 + 1.959964 * 0.05
    assert accuracy["after"] == {"mean": 0.25, "low": pytest.approx(low), "high": pytest.approx(high), "examples": 75}
    assert accuracy["better"] == "higher" and accuracy["before"] is None
    perplexity = rows["lm_eval wikitext", "word_perplexity"]
    assert perplexity["better"] == "lower" and perplexity["after"]["low"] is None
    assert rows["lm_eval gsm8k", "exact_match (flexible-extract)"]["after"]["high"] is None
    with pytest.raises(VerificationError, match="have no 'results'"):
        lm_eval_process.comparison_rows({"scores": {}})


@pytest.mark.skipif(lm_eval_process.is_available(), reason="lm_eval is installed")
def test_what_to_install_is_said() -> None:
    with pytest.raises(ConfigError, match="not installed") as caught:
        lm_eval_process.check_installed()
    assert "pip install 'lm_eval[hf]'" in str(caught.value.fix)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (package / "results.json").write_text(json.dumps(RESULTS))
    monkeypatch.syspath_prepend(str(package.parent))  # here
    monkeypatch.setenv("PYTHONPATH", str(package.parent))  # and there


def test_the_process_is_asked_and_its_results_are_read(stand_in: None, tmp_path: Path) -> None:
    found = lm_eval_process.evaluate("some/folder", tmp_path / "out", timeout_seconds=60, **OPTIONS)
    asked = found.pop("options")
    assert found == RESULTS
    assert asked["--model_args"] == "pretrained=some/folder" and asked["--tasks"] == "arc_easy,gsm8k"
    assert asked["--limit"] == "75" and "--num_fewshot" not in asked


def test_a_failure_shows_the_last_lines(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="gave no results") as caught:
        options = {**OPTIONS, "tasks": ("broken",)}
        lm_eval_process.evaluate("some/folder", tmp_path / "out", timeout_seconds=60, **options)
    assert "exit code 3" in str(caught.value) and "no such task: broken" in str(caught.value)


def test_the_command_line() -> None:
    options = {**OPTIONS, "num_fewshot": 5, "limit": None, "apply_chat_template": True}
    line = lm_eval_process.command("f", "o", **options)
    assert line[:3] == [sys.executable, "-m", "lm_eval"] and line[-1] == "--apply_chat_template"
    assert "--limit" not in line and line[line.index("--num_fewshot") + 1] == "5"
