"""vLLM serves an adapter: its log-probs and greedy tokens are those of our merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import vllm_process
from posttrain_lib.checkpoint.adapters import save_adapter
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraSettings, apply_lora, merged_state_dict
from tests.support.lora_cases import scramble
from tests.support.tiny_models import write_tiny_model

PROMPTS, NEW_TOKENS = [[5, 9, 33, 60, 7, 81], [50, 19, 3, 44], [77]], 12
#: float32 products in another order on both sides; measured: up to 2e-5. The adapters move log-probs by more than 1.
NEAR = 1e-3

Answers = dict[str, dict[str, Any]]


def loaded(folder: Path) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model.eval()


@pytest.mark.slow
@pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed")
@pytest.mark.parametrize(("case", "changes"), [("qwen3", {"head_dim": 32}), ("phi3", {"hidden_size": 128})])
def test_vllm_serves_the_adapter_as_merged(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    folder = write_tiny_model(case, tmp_path / "model", **changes)
    spec = spec_from_folder(folder)
    adapters = {"layers": LoraSettings(4, 6.0, ("attention", "mlp"))}
    if case == "qwen3":  # vLLM gives Phi-3's embedding and head none
        adapters["everything"] = LoraSettings(4, 6.0, ("attention", "mlp", "head", "embedding"), rslora=True)
    merged: dict[str, Decoder] = {"": loaded(folder)}
    for name, settings in adapters.items():
        adapted = apply_lora(loaded(folder), settings)
        scramble(adapted, size=0.15)
        assert save_adapter(adapted, spec, tmp_path / name) == []
        merged[name] = loaded(folder)
        merged[name].load_state_dict(merged_state_dict(adapted))
    question = {
        "folder": str(folder),
        "adapters": {name: str(tmp_path / name) for name in adapters},
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
    }
    answers: Answers = vllm_process.ask("tests.support.vllm_lora", question, timeout_seconds=300.0)
    moved = {}
    for name, answer in answers.items():
        model = merged[name]
        mine = greedy_generate(model, PROMPTS, NEW_TOKENS, [])
        assert mine == answer["tokens"], name
        ours = token_logprobs(model, [prompt + new for prompt, new in zip(PROMPTS, mine, strict=True)])
        for row, theirs in zip(ours, answer["logprobs"], strict=True):
            assert row[-NEW_TOKENS:] == pytest.approx(theirs, abs=NEAR), name
        base = token_logprobs(merged[""], [prompt + new for prompt, new in zip(PROMPTS, mine, strict=True)])
        moved[name] = max(abs(a - b) for pair in zip(ours, base, strict=True) for a, b in zip(*pair, strict=True))
    assert moved.pop("") == 0.0 and min(moved.values()) > 1.0, moved
