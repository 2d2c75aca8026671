"""What every loss must keep, as a check that a loss of one's own can be run through:

    from posttrain_lib.losses import build_loss
    from posttrain_lib.losses.contract import check_loss

    check_loss(build_loss("my_package.losses:MyLoss", {"beta": 0.1}))

It trains on nothing and needs no data: a tiny decoder and a few random documents or pairs are made in float64, where
only the order of sums may show; the law about half precision alone is tried in float32. An AssertionError says which
law is broken and by how much.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.data.assemble import assemble, segments_of, store_filler
from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.data.units import LEAST_SHARED, units_of
from posttrain_lib.losses.base import Loss, LossOutput
from posttrain_lib.losses.beside import Beside
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.schema.examples import TokenizedExample

if TYPE_CHECKING:
    from posttrain_lib.schema.batches import PackedBatch

VOCABULARY = 48
_ROW_TOKENS = 320
_UNITS = 6
#: float64: 1e-16 a term, sums of thousands of terms of mixed signs
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12


def check_loss(loss: Loss, model: Decoder | None = None, *, seed: int = 0) -> None:
    """Hold a loss against the laws; it is left with another reference or teacher than it came with, if it has one.

    * How documents are packed, ordered, padded, split over micro-batches, and whether a pair holds its prompt once or
      twice changes neither loss, gradient, figures nor any document's items.
    * The divisor is known from the numpy batch alone; a batch that has none (padding, or nothing trained) gives a zero
      that belongs to the graph, and zero gradients for every parameter.
    * What it returns has the shapes that ``LossOutput`` states, and the figures that ``Loss.figures`` names.
    * Under autocast to bfloat16 the model's products are in half precision, and the loss's own sum is not.
    * Of pairs: where chosen and rejected change places ``rewards/margin`` changes its sign, and where policy and
      reference are one model it is 0.

    Args:
        model: a decoder in float64 with a vocabulary of at least :data:`VOCABULARY`, if a tiny one will not do (a loss
            of scores needs a head of one row).

    Raises:
        AssertionError: a law is broken.
    """
    model = tiny_decoder(seed) if model is None else model
    assert isinstance(loss, Loss), f"a loss is derived from losses.base.Loss, and this is a {type(loss).__name__}"
    # What was sampled behind a prompt is a document as any other.
    kind = "pair" if loss.kind == "pair" else "document"
    if loss.needs is not None:
        loss.attach(Beside(other_than(model)))
    with tempfile.TemporaryDirectory() as folder:
        store = write_examples(Path(folder) / "store", kind, seed)
        _check_layouts(loss, model, store)
        _check_empty(loss, model, store)
        _check_autocast(loss, model, store)
        if kind == "pair" and "rewards/margin" in loss.figures:
            swapped = write_examples(Path(folder) / "swapped", kind, seed, swap=True)
            _check_pairs(loss, model, store, swapped)


@dataclass(frozen=True)
class Outcome:
    """What a step's micro-batches gave: loss, gradients by parameter, (sum, weight) of each figure, and for each
    example (sum of weight times loss, sum of weights) of its items."""

    loss: float
    gradients: Mapping[str, Tensor]
    figures: Mapping[str, Tensor]
    items: Mapping[int, Tensor]


def outcome_of(loss: Loss, model: Decoder, batches: Sequence[PackedBatch]) -> Outcome:
    """Run the micro-batches (numpy) as a step does, but for the update."""
    model.zero_grad(set_to_none=True)
    divisor = sum(loss.divisor(batch) for batch in batches)
    total = 0.0
    figures: dict[str, Tensor] = {name: torch.zeros(2, dtype=torch.float64) for name in loss.figures}
    items: dict[int, Tensor] = {}
    for arrays in batches:
        batch = to_torch(dataclasses.replace(arrays, signals=loss.signals(arrays, "train")))
        output = loss(model, batch)
        _check_output(loss, batch, output)
        (output.local_sum / (divisor or 1.0)).backward()
        total += float(output.local_sum.detach())
        for name in figures:
            figures[name] = figures[name] + output.figures[name]
        for segment, value, weight in zip(output.segments, output.values, output.weights, strict=True):
            example = int(batch.document_ids[segment])
            items[example] = items.get(example, 0) + torch.stack([value * weight, weight]).double()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not missing, f"no gradient reaches {missing}: sharded training would wait for it"
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    infinite = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not infinite, f"the gradient of {infinite} is not finite"
    return Outcome(total / divisor if divisor else total, gradients, figures, items)


def _check_output(loss: Loss, batch: PackedBatch, output: LossOutput) -> None:
    assert isinstance(output, LossOutput), f"a loss returns a LossOutput, and this one a {type(output).__name__}"
    assert output.local_sum.shape == () and output.local_sum.requires_grad, "local_sum is a scalar of the graph"
    assert not output.values.requires_grad, "values are detached"
    shapes = {tuple(tensor.shape) for tensor in (output.values, output.weights, output.segments)}
    assert len(shapes) == 1 and len(next(iter(shapes))) == 1, f"values, weights, segments have one shape [M]: {shapes}"
    real = batch.document_ids[output.segments] >= 0
    assert bool(real.all()), "an item belongs to a segment of padding"
    assert set(output.figures) == set(loss.figures), f"figures {set(output.figures)}, announced {loss.figures}"
    for name, figure in output.figures.items():
        fits = figure.shape == (2,) and figure.dtype == torch.float64 and not figure.requires_grad
        assert fits, f"the figure {name} is a detached float64 [2], got {figure}"


def _check_layouts(loss: Loss, model: Decoder, store: TokenStore) -> None:
    alone = pack(store, [(unit,) for unit in range(_UNITS)], 1)
    assert sum(loss.divisor(batch) for batch in alone) > 0, "the divisor of a batch with trained tokens is above 0"
    expected = outcome_of(loss, model, alone)
    assert expected.items, "no item came out of a batch with trained tokens"
    assert any(bool(gradient.any()) for gradient in expected.gradients.values()), "all gradients are zero"
    for name, batches in layouts(store):
        found = outcome_of(loss, model, batches)
        _same(f"{name}: loss", found.loss, expected.loss)
        for kind in ("gradients", "figures", "items"):
            ours, theirs = getattr(found, kind), getattr(expected, kind)
            assert ours.keys() == theirs.keys(), f"{name}: {kind} of {ours.keys()}, expected {theirs.keys()}"
            for key, value in theirs.items():
                _same(f"{name}: {kind} of {key}", ours[key], value)


def layouts(store: TokenStore) -> Iterator[tuple[str, list[PackedBatch]]]:
    """Ways to lay the same units out, with a name each."""
    forwards = tuple(range(_UNITS))
    yield "all in one row", pack(store, [forwards], 1)
    yield "two rows in one micro-batch", pack(store, [forwards[:4], forwards[4:]], 2)
    yield "another order", pack(store, [forwards[::-1]], 1)
    yield "more padding", pack(store, [forwards], 1, row_tokens=2 * _ROW_TOKENS + 7)
    yield "an empty micro-batch more", pack(store, [forwards, ()], 1)
    if store.shared.any():
        yield "shared beginnings", pack(store, [forwards[::2], forwards[1::2]], 1, share=True)


def _check_empty(loss: Loss, model: Decoder, store: TokenStore) -> None:
    padding = pack(store, [()], 1)
    assert loss.divisor(padding[0]) == 0, "a batch of padding has a divisor of 0"
    nothing = np.zeros(0, np.int32)
    masked = [
        dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights), supervised_index=nothing)
        for batch in pack(store, [tuple(range(_UNITS))], 1)
    ]
    for name, batches in (("padding", padding), ("nothing trained", masked)):
        found = outcome_of(loss, model, batches)
        if loss.divisor(batches[0]) == 0:
            assert found.loss == 0.0, f"{name}: the loss is {found.loss}, expected 0"
            moved = [key for key, gradient in found.gradients.items() if gradient.any()]
            assert not moved, f"{name}: there are gradients in {moved}"


def _check_autocast(loss: Loss, model: Decoder, store: TokenStore) -> None:
    beside, model = loss.beside, copy.deepcopy(model).float()
    if loss.needs is not None:
        loss.attach(Beside(other_than(model)))
    (arrays,) = pack(store, [tuple(range(_UNITS))], 1)
    batch = to_torch(dataclasses.replace(arrays, signals=loss.signals(arrays, "train")))
    plain = loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(model, batch)
    found = output.local_sum
    assert found.dtype in (torch.float32, torch.float64), f"under autocast local_sum is {found.dtype}, half a precision"
    # where it is no plain sum of the items, as with a penalty, there is nothing that it could be held against
    if _close(plain.local_sum, _sum_of_items(plain)):
        expected = _sum_of_items(output)
        assert _close(found, expected), f"under autocast local_sum is {found.item()}, its items' sum {expected.item()}"
    if beside is not None:
        loss.attach(beside)


def _sum_of_items(output: LossOutput) -> Tensor:
    return (output.values.double() * output.weights.double()).sum()


def _close(found: Tensor, expected: Tensor) -> bool:
    """But for float32's rounding of some tens of terms."""
    return bool(torch.isclose(found.detach().double(), expected, rtol=1e-6, atol=0))


def _check_pairs(loss: Loss, model: Decoder, store: TokenStore, swapped: TokenStore) -> None:
    rows = [tuple(range(_UNITS))]
    here, there = (outcome_of(loss, model, pack(each, rows, 1)).figures for each in (store, swapped))
    _same("chosen and rejected swapped: rewards/margin", -there["rewards/margin"][0], here["rewards/margin"][0])
    if loss.needs == "reference":
        loss.attach(Beside(copy.deepcopy(model)))
        margin = outcome_of(loss, model, pack(store, rows, 1)).figures["rewards/margin"]
        _same("the reference is the policy: rewards/margin", margin[0], torch.zeros((), dtype=torch.float64))


def _same(what: str, found: float | Tensor, expected: float | Tensor) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found),
        torch.as_tensor(expected),
        rtol=_RELATIVE,
        atol=_ABSOLUTE,
        msg=lambda text: f"{what}: {text}",
    )


def pack(
    store: TokenStore,
    rows: Sequence[Sequence[int]],
    per_batch: int,
    *,
    row_tokens: int = _ROW_TOKENS,
    share: bool = False,
) -> list[PackedBatch]:
    """Rows of units (documents or pairs, by number) as the loader packs them, ``per_batch`` of them in a batch."""
    segments = segments_of(store, units_of(store, row_tokens, share_prefixes=share), Rows.of(rows))
    return assemble(segments, store_filler(store, segments), row_tokens, per_batch)


def write_examples(folder: Path, kind: str, seed: int, *, swap: bool = False) -> TokenStore:
    """A store of random examples of two sources: documents, half of their tokens trained with several weights; or
    pairs, whose answers alone are trained. ``swap``: the rejected first."""
    with TokenStoreWriter(folder) as writer:
        for row in range(_UNITS):
            random, source = np.random.default_rng([seed, row]), f"source {row % 2}"
            if kind == "document":
                ids = random.integers(0, VOCABULARY, 3 + 4 * row).astype(np.int32)
                weights = ((random.random(len(ids)) < 0.5) * random.choice([0.5, 1.0, 2.0])).astype(np.float32)
                weights[-1] = 1.0
                writer.add(TokenizedExample(ids, weights, source, f"row {row}"))
                continue
            prompt = random.integers(0, VOCABULARY, LEAST_SHARED + 1 + row)
            answers = [random.integers(0, VOCABULARY, length) for length in random.integers(1, 9, 2)]
            for number, answer in enumerate(answers[::-1] if swap else answers):
                ids = np.concatenate([prompt, answer]).astype(np.int32)
                weights = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
                example = TokenizedExample(ids, weights, source, f"row {row}")
                writer.add(example, kind=kind, shared=len(prompt) - 1 if number else 0, row=(0, row))
    return TokenStore(folder)


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Random weights in float64 for a Qwen3 of some thousand parameters; ``changes`` replace fields of its config."""
    content = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
        "use_sliding_window": False,
        **changes,
    }
    spec = spec_from_config(content)
    model = build_model(spec, dtype=torch.float64)
    init_weights(model, spec, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # a fresh model's gradients would vanish in the tolerance
    return model


def other_than(model: Decoder) -> Decoder:
    """A frozen model of the same shape that says something else."""
    other = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other
