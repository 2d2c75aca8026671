"""Losses on tokens: SFT with and without its options, and the binary one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.losses.contract import outcome_of, pack, tiny_decoder, write_examples
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.losses.sigmoid import SigmoidLoss
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.schema.batches import PackedBatch

EXACT = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    store: TokenStore = write_examples(tmp_path_factory.mktemp("documents") / "store", "document", seed=0)
    return pack(store, [tuple(range(6))], 1)[0]


def supervised_logits(model: Decoder, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], targets [N] and weights [N] of the supervised tokens, through full logits."""
    tensors = to_torch(batch)
    logits = model(tensors.token_ids, tensors.positions, tensors.cu_seqlens, tensors.max_seqlen)
    index = tensors.supervised_index
    return logits[index], tensors.target_ids[index], tensors.loss_weights[index].double()


def test_without_options_it_is_the_plain_operation_bit_for_bit(batch: PackedBatch) -> None:
    model, tensors = tiny_decoder(0), to_torch(batch)

    def plain(hidden, head):
        return linear_cross_entropy(hidden, head, tensors.target_ids, tensors.loss_weights, tensors.supervised_index)

    inputs = (tensors.token_ids, tensors.positions, tensors.cu_seqlens, tensors.max_seqlen)
    expected, nll = model(*inputs, plain)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    output = SFTLoss(label_smoothing=0.0, z_loss=0.0, entropy_bonus=0.0)(model, tensors)
    output.local_sum.backward()
    assert torch.equal(output.local_sum, expected) and torch.equal(output.values, nll)
    assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(model.parameters(), gradients, strict=True))
    assert not output.figures and SFTLoss().figures == ()


def test_options_are_the_textbook_terms(batch: PackedBatch) -> None:
    model = tiny_decoder(0)
    found = outcome_of(SFTLoss(label_smoothing=0.1, z_loss=0.01, entropy_bonus=0.3), model, [batch])
    logits, targets, weights = supervised_logits(model, batch)
    logprobs, log_z = logits.log_softmax(-1), logits.logsumexp(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    smoothed = cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    expected = ((smoothed + 0.01 * log_z.square() - 0.3 * entropy) * weights).sum() / weights.sum()
    assert found.loss == pytest.approx(expected.item(), **EXACT)
    nll = cross_entropy(logits, targets, reduction="none")
    means = {name: (figure[0] / figure[1]).item() for name, figure in found.figures.items()}
    parts = {"nll": nll, "log_z": log_z, "entropy": entropy}
    wanted = {name: ((part * weights).sum() / weights.sum()).item() for name, part in parts.items()}
    assert means == pytest.approx(wanted, **EXACT)
    expected.backward()
    for (name, parameter), kept in zip(model.named_parameters(), found.gradients.values(), strict=True):
        parameter_grad = parameter.grad - kept  # outcome_of left its own behind
        torch.testing.assert_close(parameter_grad, kept, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


class WithLabels(SigmoidLoss):
    """Labels by the place of the token."""

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        return {"label": (batch.supervised_index % 3 == 0).astype(np.float32)}


@pytest.mark.parametrize("by_sign", [True, False], ids=["labels by sign", "labels by signal"])
def test_the_binary_loss_takes_the_targets_logit_alone(batch: PackedBatch, by_sign: bool) -> None:
    model = tiny_decoder(0)
    label = batch.supervised_index % 3 == 0
    loss: SigmoidLoss = WithLabels()
    if by_sign:
        signed = batch.loss_weights.copy()
        signed[batch.supervised_index] *= np.where(label, 1, -1)
        batch, loss = dataclasses.replace(batch, loss_weights=signed), SigmoidLoss()
    found = outcome_of(loss, model, [batch])
    logits, targets, weights = supervised_logits(model, batch)
    picked, wanted = logits.gather(1, targets[:, None]).squeeze(1), torch.from_numpy(label).double()
    values = binary_cross_entropy_with_logits(picked, wanted, reduction="none")
    assert found.loss == pytest.approx(((values * weights.abs()).sum() / weights.abs().sum()).item(), **EXACT)
    total, weight = found.figures["positives"].tolist()
    assert total / weight == pytest.approx(((wanted * weights.abs()).sum() / weights.abs().sum()).item(), **EXACT)
    rows = {int(target) for target in targets}
    moved = found.gradients["lm_head.weight"].abs().sum(-1).nonzero().flatten().tolist()
    assert set(moved) == rows, "no other token's row of the head is touched"
