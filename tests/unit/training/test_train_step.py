"""One step: however the rows are split, the gradient is the same; nothing non-finite reaches the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import TrainingError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.base import Loss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.optim import build_optimizer
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.train_step import StepSettings, accumulate_gradients, train_step
from tests.oracles.tiny_job import make_job, pack_rows, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_job(tmp_path, tiny_config())
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    spec = spec_from_folder(folder / "model")
    model = build_model(spec, dtype=dtype)
    load_hf_weights(model, spec, folder / "model")
    return model


def settings(store: TokenStore, **changes: object) -> StepSettings:
    values = {"mesh": rank_mesh(SINGLE, CPU), "precision": "fp32", "clip_norm": 1.0, "sources": len(store.sources)}
    return StepSettings(**{**values, "name_example": store.row_id, **changes})


def gradients(model: Decoder, micro_batches: list[PackedBatch], store: TokenStore) -> tuple[float, dict]:
    divisor = sum(batch.weight for batch in micro_batches)
    loss, _ = accumulate_gradients(model, build_loss("sft"), micro_batches, settings(store), global_divisor=divisor)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, expected in one.items():
        # float64: only the order of sums differs, 1e-16 each over at most thousands of terms
        torch.testing.assert_close(
            other[name], expected, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("micro_batch_rows", [2, 4, 8])
def test_micro_batch_split_changes_nothing(folder: Path, micro_batch_rows: int) -> None:
    store = TokenStore(folder / "train")

    def run(rows: int) -> tuple[float, dict]:
        with PackedLoader(
            StoreFeed(store, row_tokens=32), row_tokens=32, rows_per_step=8, micro_batch_rows=rows
        ) as loader:
            return gradients(load(folder), loader.next_step().micro_batches, store)

    loss, expected = run(1)
    again, found = run(micro_batch_rows)
    assert again == pytest.approx(loss, rel=1e-12)
    assert_same(expected, found)


def test_packing_changes_nothing(folder: Path) -> None:
    store = TokenStore(folder / "train")
    packed = [pack_rows(store, [(0, 1, 2), (3, 4)], 128)]
    alone = [pack_rows(store, [(example,)], 40) for example in range(5)]
    loss, expected = gradients(load(folder), packed, store)
    again, found = gradients(load(folder), alone, store)
    assert again == pytest.approx(loss, rel=1e-12)
    assert_same(expected, found)


def test_an_empty_micro_batch_takes_part_and_adds_nothing(folder: Path) -> None:
    store = TokenStore(folder / "train")
    full, empty = pack_rows(store, [(0, 1)], 64), pack_rows(store, [()], 64)
    _, expected = gradients(load(folder), [full], store)
    _, found = gradients(load(folder), [full, empty], store)
    assert_same(expected, found)
    _, alone = gradients(load(folder), [empty], store)
    assert all(gradient is not None and not gradient.any() for gradient in alone.values())


def test_recomputation_changes_nothing(folder: Path) -> None:
    store = TokenStore(folder / "train")
    batch = [pack_rows(store, [(0, 1, 2)], 128)]
    _, expected = gradients(load(folder), batch, store)
    recomputing = apply_parallelism(load(folder), mesh=rank_mesh(SINGLE, CPU), activation_checkpointing="full")
    _, found = gradients(recomputing, batch, store)
    assert set(found) == set(expected), "recomputation must not rename weights"
    assert_same(expected, found)


def test_loss_is_the_weighted_mean_and_sources_add_up(folder: Path) -> None:
    store = TokenStore(folder / "train")
    batch = pack_rows(store, [(0, 1, 2, 3)], 128)
    model = load(folder)
    loss, sums = accumulate_gradients(model, build_loss("sft"), [batch], settings(store), global_divisor=batch.weight)
    logits = model(
        *(torch.from_numpy(x).long() for x in (batch.token_ids, batch.positions, batch.cu_seqlens)), batch.max_seqlen
    )
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.target_ids).long(), reduction="none")
    weights = torch.from_numpy(batch.loss_weights).double()
    assert loss == pytest.approx(((nll.detach() * weights).sum() / weights.sum()).item(), rel=1e-10)
    assert float(sums[:, 0].sum()) / batch.weight == pytest.approx(loss, rel=1e-10)
    assert float(sums[:, 1].sum()) == batch.weight
    assert (sums[:, 1] > 0).all(), "both sources are in the batch"


def test_non_finite_loss_stops_before_the_update_and_names_step_and_rows(folder: Path) -> None:
    store = TokenStore(folder / "train")
    model = load(folder, torch.float32)
    rare = 63
    bad = next(i for i in range(len(store)) if rare in store.get(i)[0][:-1] and store.trained_counts[i])
    good = next(i for i in range(len(store)) if rare not in store.get(i)[0])
    with torch.no_grad():
        model.embed_tokens.weight[rare] = float("nan")
    optimizer = build_optimizer(model, tiny_config().optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = [pack_rows(store, [(good,)], 64), pack_rows(store, [(bad,)], 64)]
    with pytest.raises(TrainingError, match="loss of step 17 is not finite") as caught:
        train_step(
            model,
            build_loss("sft"),
            optimizer,
            batches,
            settings(store),
            global_divisor=sum(batch.weight for batch in batches),
            step=17,
        )
    # The head is tied, so the NaN row spoils every document's softmax: the bad one must be among those named.
    assert store.row_id(bad) in str(caught.value.where)
    assert all(torch.equal(before[n], p) or n == "embed_tokens.weight" for n, p in model.named_parameters())
    torch.testing.assert_close(model.embed_tokens.weight, before["embed_tokens.weight"], rtol=0, atol=0, equal_nan=True)


class ExplodingGradient(Loss):
    """A user's loss whose value is finite and whose gradient is not."""

    def divisor(self, batch: PackedBatch) -> float:
        return batch.weight

    def __call__(self, model: Decoder, batch: PackedBatch) -> object:
        output = build_loss("sft")(model, batch)
        return dataclasses.replace(output, local_sum=output.local_sum + (output.local_sum * 0.0).sqrt())


def test_non_finite_gradient_stops_before_the_update(folder: Path) -> None:
    store = TokenStore(folder / "train")
    model = load(folder, torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = pack_rows(store, [(4, 5)], 64)
    with pytest.raises(TrainingError, match="gradient norm of step 3 is not finite") as caught:
        train_step(
            model,
            ExplodingGradient(),
            build_optimizer(model, tiny_config().optimizer),
            [batch],
            settings(store),
            global_divisor=batch.weight,
            step=3,
        )
    assert "row:4" in str(caught.value.where)
    assert "row:5" in str(caught.value.where)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_step_without_trained_tokens_is_a_step_of_zero_gradient(folder: Path) -> None:
    store = TokenStore(folder / "train")
    model = load(folder, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    empty = [pack_rows(store, [()], 32)]
    outcome = train_step(model, build_loss("sft"), optimizer, empty, settings(store), global_divisor=0.0, step=1)
    assert (outcome.loss, outcome.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_bf16_keeps_fp32_weights_and_is_near(folder: Path) -> None:
    store = TokenStore(folder / "train")
    batch = [pack_rows(store, [(0, 1, 2)], 128)]
    exact, _ = gradients(load(folder, torch.float32), batch, store)
    model = load(folder, torch.float32)
    rounded, _ = accumulate_gradients(
        model, build_loss("sft"), batch, settings(store, precision="bf16"), global_divisor=batch[0].weight
    )
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    # bf16 keeps 8 bits: 4e-3 per product; the mean over tokens is nearer
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact, "autocast was not on"


def test_a_shared_prefix_changes_no_gradient(folder: Path, tmp_path: Path) -> None:
    """Conversations of several documents with one beginning, packed with it once and packed whole."""
    with TokenStoreWriter(tmp_path / "shared") as writer:
        for row in range(6):
            rng = np.random.default_rng(row)
            prefix = rng.integers(0, 60, 20 + row)
            for document in range(3):
                ids = np.concatenate([prefix, rng.integers(0, 60, 4 + document)]).astype(np.int32)
                weights = (np.arange(len(ids)) >= len(prefix)).astype(np.float32)
                example = TokenizedExample(ids, weights, "s", f"{row}#{document}")
                writer.add(example, shared=len(prefix) - 1 if document else 0, row=(0, row))
    store = TokenStore(tmp_path / "shared")
    found = []
    for share in (True, False):
        feed = StoreFeed(store, row_tokens=128, share_prefixes=share, epochs=1)
        with PackedLoader(feed, row_tokens=128, rows_per_step=12, micro_batch_rows=2) as loader:
            step = loader.next_step()
        assert step is not None and step.global_weight == store.total_weight
        model = load(folder)
        loss, _ = accumulate_gradients(
            model, build_loss("sft"), step.micro_batches, settings(store), global_divisor=step.global_weight
        )
        found.append((step.real_tokens, loss, {name: p.grad for name, p in model.named_parameters()}))
    (few, loss, gradients), (many, other, others) = found
    assert few < 0.6 * many == 0.6 * store.total_tokens
    # float64, sums in another order
    assert abs(loss - other) < 1e-12
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-9, atol=1e-14)
