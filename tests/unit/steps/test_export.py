"""What the proofs of an export are made on, and that no number escapes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from posttrain_lib.adapters.vllm_check import Answer
from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.schema.manifests import ArtifactRef
from steps import export
from steps.base import StepContext
from tests.oracles.tiny_job import write_store
from tests.support.exported import RAW


@pytest.mark.parametrize(
    ("prompts", "limit", "from_documents"),
    [([[1, 2, 3], [4] * 9, [5, 6]], 8, False), ([[4] * 9], 8, True), ([], 8, True), ([], 2, True)],
    ids=["those that fit", "all too long", "of plain text", "documents are cut"],
)
def test_there_is_always_something_to_compare_on(
    tmp_path: Path, prompts: list[list[int]], limit: int, from_documents: bool
) -> None:
    held_out = write_store(tmp_path / "held_out", 5, seed=1)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
    inputs = {"prompts": ArtifactRef(str(path), "prompts", ""), "held_out": ArtifactRef(str(held_out), "tokens", "")}
    config = build_run_config({**RAW, "export": {"prompts": 4}})
    context = StepContext(config, inputs, tmp_path, tmp_path, print, print)
    store = TokenStore(held_out)
    documents = [store.get(number)[0][:limit].tolist() for number in range(4)]
    expected = documents if from_documents else [[1, 2, 3], [5, 6]]
    assert export._prompts(context, limit) == expected


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_log_probability_that_is_no_number_is_no_small_gap(place: int) -> None:
    theirs = [-1.0, -2.0, -3.25]
    answer = Answer([[7, 8]], [theirs[1:]], [theirs[:1]], [""], "0")
    ours = [[-1.0, -2.0, -3.0]]
    assert export._largest_gap(ours, answer) == 0.25
    theirs[place] = math.nan
    broken = Answer([[7, 8]], [theirs[1:]], [theirs[:1]], [""], "0")
    assert math.isnan(export._largest_gap(ours, broken))
