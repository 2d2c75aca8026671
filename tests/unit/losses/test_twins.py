"""Five steps of reward modelling and of distillation beside their readable twins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.losses.base import Loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import pack, write_examples
from posttrain_lib.losses.distill import DistillLoss
from posttrain_lib.losses.reward import RewardLoss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.train_step import StepSettings, train_step
from tests.oracles import distill_twin, reward_twin
from tests.oracles.tiny_job import write_model

#: Twin and project are float64, but for rotary tables, norms' eps and clipping's 1e-6, which float32 rounds: 1e-7 of a
#: logit.
ROUNDED = 1e-6
#: units of each step
STEPS = ((0, 1, 2), (3, 4, 5), (0, 2, 4), (1, 3, 5), (0, 1, 5))


def load(folder: Path) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, folder)
    return model


def trained_losses(loss: Loss, model: Decoder, store: TokenStore, lr: float, clip_norm: float) -> list[float]:
    """The loss of each of ``STEPS``, two micro-batches each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = StepSettings(rank_mesh(SINGLE, torch.device("cpu")), "fp32", clip_norm, 2, store.row_id)
    found = []
    for step, chosen in enumerate(STEPS, start=1):
        batches = pack(store, [chosen[:2], chosen[2:]], 1, share=True)
        divisor = sum(loss.divisor(batch) for batch in batches)
        found.append(train_step(model, loss, optimizer, batches, settings, global_divisor=divisor, step=step).loss)
    return found


def assert_same(ours: Sequence[float], theirs: Sequence[float]) -> None:
    assert ours == pytest.approx(theirs, rel=ROUNDED)
    assert max(theirs) > 1.1 * min(theirs), "steps that change nothing would prove little"


def test_reward(tmp_path: Path) -> None:
    centre, margin_weight, lr, clip_norm = 0.05, 0.5, 0.3, 2.0
    folder, margins = tmp_path / "model", (0.5, None, 1.25, 0.0, -0.75, None)
    classifier = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_model(folder, 0, tie_word_embeddings=False, **classifier)
    pairs = write_examples(tmp_path / "pairs", "pair", seed=0)
    with TokenStoreWriter(tmp_path / "store") as writer:
        for example in range(len(pairs)):
            made = TokenizedExample(*pairs.get(example), pairs.source(example), pairs.row_id(example))
            row, shared = example // 2, int(pairs.shared[example])
            writer.add(made, kind="pair", shared=shared, row=(0, row), margin=margins[row])
    store = TokenStore(tmp_path / "store")
    ours = trained_losses(RewardLoss(centre, margin_weight), load(folder), store, lr, clip_norm)

    def pair_of(unit: int) -> reward_twin.Pair:
        chosen, rejected = (store.get(example)[0].tolist() for example in (2 * unit, 2 * unit + 1))
        return chosen, rejected, margin_weight * (margins[unit] or 0.0)

    steps = [[pair_of(unit) for unit in chosen] for chosen in STEPS]
    assert_same(ours, reward_twin.train(folder, steps, centre=centre, lr=lr, clip_norm=clip_norm))


@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_distill(tmp_path: Path, temperature: float, hard_weight: float) -> None:
    lr, clip_norm = 0.3, 2.0
    student, teacher = write_model(tmp_path / "student", 0), write_model(tmp_path / "teacher", 1, hidden_size=24)
    store = write_examples(tmp_path / "store", "document", seed=0)
    loss = DistillLoss(temperature=temperature, hard_weight=hard_weight)
    loss.attach(Beside(load(teacher).requires_grad_(False)))
    ours = trained_losses(loss, load(student), store, lr, clip_norm)
    steps = [[tuple(part.tolist() for part in store.get(unit)) for unit in chosen] for chosen in STEPS]
    options = {"temperature": temperature, "hard_weight": hard_weight, "lr": lr, "clip_norm": clip_norm}
    assert_same(ours, distill_twin.train(student, teacher, steps, **options))
