"""The export's proof in a real vLLM: same numbers as ours, no compiler needed, a broken folder said as such."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from posttrain_lib.adapters import vllm_check, vllm_process
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ExportError
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.scratch import write_scratch_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]
PROMPTS = [[5, 40, 7, 90, 12], [30, 31, 32]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of a few thousand parameters, its weights large enough that a greedy choice is clear."""
    root = tmp_path_factory.mktemp("served")
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, root / "tok")
    architecture = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }  # fmt: skip
    write_scratch_model("qwen3", architecture, root / "tok", 0, root / "hf")
    return root / "hf"


def test_log_probs_and_greedy_tokens_are_ours_without_a_compiler(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every command that a bare machine has, and no compiler: vLLM itself calls lscpu.
    tools = {name: shutil.which(name) for name in ("sh", "lscpu", "ldconfig", "uname", "cat", "grep")}
    for name, place in tools.items():
        if place:
            (tmp_path / name).symlink_to(place)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}")
    assert not [name for name in ("cc", "gcc", "c++", "g++", "clang") if shutil.which(name)]
    answer = vllm_check.generate(vllm_check.Request(str(folder), PROMPTS, 6, "float32", 64))
    model = load_model(folder)
    assert answer.token_ids == greedy_generate(model, PROMPTS, 6, ())
    ours = token_logprobs(model, [p + a for p, a in zip(PROMPTS, answer.token_ids, strict=True)])
    theirs = [[*p, *c] for p, c in zip(answer.prompt_logprobs, answer.logprobs, strict=True)]
    # export.max_logprob_gap's own reason: vLLM packs and fuses its linears, so sums are rounded in another order
    assert ours[0] == pytest.approx(theirs[0], abs=0.02)
    assert ours[1] == pytest.approx(theirs[1], abs=0.02)


def test_a_folder_that_vllm_does_not_load(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ExportError, match="vLLM does not load") as caught:
        vllm_check.generate(vllm_check.Request(str(tmp_path), PROMPTS, 2, "float32", 64))
    assert "exit code" in str(caught.value.got)
