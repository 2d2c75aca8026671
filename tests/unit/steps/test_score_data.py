"""What a frozen model says is stored once for a data set and a model, whatever is then done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.signal_table import SignalTable
from posttrain_lib.data.token_store import TokenStore
from steps import score_data
from steps.pipeline import chain, run_until

TINY = Path(__file__).parents[2] / "flows" / "tiny.yaml"


def config_of(**dpo: Any) -> RunConfig:
    raw: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    raw["data"]["sources"] = [{"name": "p", "format": "preference", "generate": {"rows": 40, "pairs": True}}]
    raw["evaluation"] = {}
    return build_run_config({**raw, "recipe": "dpo", "dpo": dpo})


def test_a_recipe_without_a_frozen_model_has_no_such_step() -> None:
    assert score_data.STEP in chain(config_of())
    assert score_data.STEP not in chain(config_of(variant="simpo"))


def test_only_what_decides_the_values_is_in_the_key() -> None:
    first = score_data.settings(config_of())
    assert first == score_data.settings(config_of(beta=0.9, variant="ipo"))
    assert first != score_data.settings(config_of(reference={"kept": "live"}))


@pytest.mark.slow
def test_the_values_are_stored_once_and_belong_to_their_store() -> None:
    said: list[str] = []
    manifests = run_until("score_data", config_of(), say=said.append)
    for split in score_data.SPLITS:
        store = TokenStore(Path(manifests["prepare_data"].outputs[split].uri))
        table = SignalTable(manifests["score_data"].outputs[split].uri, store)
        assert table.made_of["model"] == manifests["inputs"].outputs["model"].digest
        logprobs = table.columns["logprob"]
        assert len(logprobs) == len(store)
        assert (logprobs < 0).all()
    again = run_until("score_data", config_of(beta=0.9), say=said.append)["score_data"]
    assert again.outputs == manifests["score_data"].outputs
    beside = run_until("score_data", config_of(reference={"kept": "live"}), say=said.append)["score_data"]
    assert beside.outputs == {}
