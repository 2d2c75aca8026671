"""Losses and gradients on pairs against what TRL's own trainers computed (``tests.oracles.trl_values``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posttrain_lib.checkpoint.hf import load_hf_weights, stored_tensors
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import outcome_of, pack
from posttrain_lib.losses.reward import RewardLoss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample
from tests.oracles.tiny_job import write_model
from tests.oracles.trl_values import score_weight
from tests.support.score_decoder import ScoreDecoder

FIXTURE: dict[str, Any] = json.loads(Path(__file__).with_name("trl_values.json").read_text(encoding="utf-8"))


class WithMargins(RewardLoss):
    """The fixture's margins by pair."""

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        found = super().signals(batch, split)
        return {**found, "margin": np.array(FIXTURE["margins"])[batch.document_ids[found["chosen"]] // 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    for name in ("policy", "reference"):
        write_model(folder / name, FIXTURE["seeds"][name])
    with TokenStoreWriter(folder / "pairs") as writer:
        for row, (prompt, *answers) in enumerate(FIXTURE["pairs"]):
            for answer in answers:
                ids = np.array(prompt + answer, np.int32)
                weights = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
                writer.add(TokenizedExample(ids, weights, "s", f"row {row}"), kind="pair", row=(0, row))
    return folder


def load(folder: Path) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, folder)
    return model


def with_score(model: Decoder) -> Decoder:
    model.__class__ = ScoreDecoder
    model.lm_head = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.copy_(score_weight())
    return model


@pytest.mark.parametrize("case", FIXTURE["cases"])
def test_loss_and_gradients_are_those_of_trl(folder: Path, case: str) -> None:
    wanted = FIXTURE["cases"][case]
    name, options = wanted["loss"]
    model = load(folder / "policy")
    if name == "reward":
        model, loss = with_score(model), WithMargins(**options)
    else:
        loss = build_loss(name, options)
    if loss.needs:
        loss.attach(Beside(load(folder / "reference")))
    found = outcome_of(loss, model, pack(TokenStore(folder / "pairs"), [(0, 2), (1,)], 1))
    # transformers' norms and rotary embeddings round to float32 (6e-8) in a float64 model too, and TRL's log-probs of
    # sums of around 30 do so again, 2e-6 of a loss around 1.
    tolerance = 1e-6 if name == "reward" else 1e-5
    assert found.loss == pytest.approx(wanted["loss_value"], rel=tolerance)
    gradients = dict(found.gradients)
    norms = wanted["gradient_norms"]
    if name == "reward":
        assert gradients.pop("lm_head.weight").norm().item() == pytest.approx(norms.pop("score.weight"), rel=tolerance)
    spec = spec_from_folder(folder / "policy")
    stored = {key: tensor.norm().item() for key, tensor in stored_tensors(spec, gradients, torch.float64).items()}
    assert stored == pytest.approx(norms, rel=10 * tolerance, abs=tolerance * max(norms.values()))
