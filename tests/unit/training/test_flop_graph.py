"""The FLOP count against torch's own counter, for every family, trained whole or through adapters, recomputed or not.

torch counts matrix products that it sees as operators. On a CPU it sees none of the fused attention kernels, so that
with them everything but attention is compared, to the FLOP; attention is compared with the plain kernel, which
computes whole squares where half is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from posttrain_lib.data.collate import to_torch
from posttrain_lib.losses import build_loss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.lora import LoraSettings, apply_lora, known_targets
from posttrain_lib.models.score import with_score_head
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.models.spec import AttentionConfig, GatedDeltaConfig, LatentAttentionConfig, Mixer, ModelSpec
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.attention_pieces import pieces
from posttrain_lib.ops.gated_delta import gated_delta_rule
from posttrain_lib.parallel.recomputation import recompute_blocks
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.training.flops import FlopCount, Recomputing
from tests.support.lora_cases import everything_of
from tests.support.tiny_models import CASES, write_tiny_model

#: one longer than the windows of the cases, one of a single token
LENGTHS = (7, 1, 20, 4)
#: what is trained: all weights, adapters of the projections inside the blocks, one adapter in the third layer, or an
#: adapter of everything that can have one
TRAINED = ("full", "blocks", "one", "everything")
#: (trained, recomputation) that every run of the suite compares; the others are slow only for their number
QUICK = {("full", "selective"), ("everything", "full"), ("one", "none")}
#: the layer of the one adapter
ADAPTED = 2
Mode = Literal["none", "selective", "full"]


@cache
def spec_of(case: str) -> ModelSpec:
    with TemporaryDirectory() as folder:
        path = write_tiny_model(case, Path(folder))
        return spec_from_config(json.loads((path / "config.json").read_text()))


def settings_of(spec: ModelSpec, trained: str) -> LoraSettings | None:
    model = build_model(spec, device="meta")
    if trained == "full":
        return None
    if trained == "everything":
        return everything_of(model)
    known = known_targets(model)
    if trained == "blocks":
        return LoraSettings(4, 8.0, tuple(name for name in ("attention", "mlp", "experts") if name in known))
    is_delta = isinstance(spec.config.layers[ADAPTED].attention, GatedDeltaConfig)
    return LoraSettings(4, 8.0, (f"layers.{ADAPTED}.attention.{'out_proj' if is_delta else 'o_proj'}",))


def model_of(spec: ModelSpec, settings: LoraSettings | None, mode: Mode = "none") -> Decoder:
    model = build_model(spec)
    init_weights(model, spec, seed=0)
    if settings is not None:
        model = apply_lora(model, settings)
    recompute_blocks(model, mode)
    return model


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    """Random tokens, every third of them trained."""
    total = sum(lengths)
    ids = np.random.default_rng(0).integers(3, 90, total).astype(np.int32)
    weights = (np.arange(total) % 3 == 0).astype(np.float32)
    return PackedBatch(
        token_ids=ids,
        target_ids=ids,
        loss_weights=weights,
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        supervised_index=np.flatnonzero(weights),
        document_sources=np.zeros(len(lengths), np.int32),
        document_ids=np.arange(len(lengths)),
        max_seqlen=max(lengths),
        real_tokens=total,
    )


def _in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: Decoder, batch: PackedBatch, *, plain_attention: bool = False) -> int:
    """What torch counts of a forward and a backward; it has no entry of its own for a product added in place."""
    kernels = [SDPBackend.MATH] if plain_attention else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    own = {torch.ops.aten.addmm_: _in_place}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(kernels):
        build_loss("sft")(model, to_torch(batch)).local_sum.backward()
    return int(counter.get_total_flops())


def without_attention(count: FlopCount) -> FlopCount:
    return FlopCount(count.token, count.supervised)


@dataclass(frozen=True)
class Flow:
    """Of one layer's mixing of tokens: whether a gradient flows through it, and whether its forward runs again."""

    gradient: bool
    again: bool

    @classmethod
    def of(cls, layer: int, trained: str, mode: Mode) -> Flow:
        """With the one adapter, of an output projection, nothing flows below it; its own block runs again though."""
        above = trained != "one" or layer > ADAPTED
        return cls(above, mode != "none" and (above or layer == ADAPTED))


def seen_of_attention(own: Mixer, flow: Flow) -> float:
    """What torch sees of attention with fused kernels: of those with a soft cap the products of whole tables, 2 in a
    forward and 5 in a backward, which forms the scores again."""
    if not isinstance(own, AttentionConfig) or own.softcap is None:
        return 0.0
    tables = sum(
        (piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start)
        for piece in pieces(LENGTHS, LENGTHS, own.window, longest=256)
    )
    return (2 + 5 * flow.gradient + 2 * flow.again) * 2.0 * own.num_attention_heads * own.head_dim * tables


def delta_beyond(own: Mixer, flow: Flow, trained: str) -> float:
    """What torch sees of the delta rule in chunks, less what is counted of it as a recurrence."""
    if not isinstance(own, GatedDeltaConfig):
        return 0.0
    heads, tokens = own.num_value_heads, sum(LENGTHS)
    shapes = ((heads, own.key_dim), (heads, own.key_dim), (heads, own.value_dim), (heads,), (heads,))
    inputs = [torch.rand(tokens, *shape).neg().requires_grad_(flow.gradient) for shape in shapes]
    layout = DocumentLayout.of(torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
    with FlopCounterMode(display=False) as forward:
        query, key, value, decay, beta = inputs
        out, _ = gated_delta_rule(query, key, value, decay, beta, layout, scale=1.0, normalise=True)
    with FlopCounterMode(display=False) as backward:
        if flow.gradient:
            out.sum().backward()
    memory = 6.0 * heads * own.key_dim * own.value_dim
    taps = 2.0 * own.kernel * (2 * own.num_key_heads * own.key_dim + heads * own.value_dim)
    recurrence = memory * (1 + 2 * flow.gradient + flow.again)
    convolution = taps * (1 + flow.gradient + (trained == "full") + flow.again)
    chunks = forward.get_total_flops() * (1 + flow.again) + backward.get_total_flops()
    return chunks - tokens * (recurrence + convolution)


def combinations() -> Iterator[Any]:
    for case in CASES:
        for trained in TRAINED:
            for mode in ("none", "selective", "full"):
                marks = () if (trained, mode) in QUICK else (pytest.mark.slow,)
                yield pytest.param(case, trained, mode, marks=marks)


@pytest.mark.parametrize(("case", "trained", "mode"), list(combinations()))
def test_everything_but_attention_is_what_torch_counts(case: str, trained: str, mode: Mode) -> None:
    spec, batch = spec_of(case), batch_of()
    settings = settings_of(spec, trained)
    count = FlopCount.of(spec, settings, Recomputing(mode))
    flops = replace(count, pairs={}).batch(batch)
    expected = flops.model + flops.recomputed
    for number, layer in enumerate(spec.config.layers):
        flow = Flow.of(number, trained, mode)
        expected += seen_of_attention(layer.attention, flow) + delta_beyond(layer.attention, flow, trained)
    assert counted(model_of(spec, settings, mode), batch) == expected


@pytest.mark.parametrize("trained", ["full", pytest.param("blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_half_of_the_squares_that_torch_counts(case: str, trained: str) -> None:
    """With torch's plain kernel, whole squares; documents no longer than the narrowest window have no mask."""
    spec, batch = spec_of(case), batch_of((5, 1, 9))
    if any(_has_no_plain_kernel(layer.attention) for layer in spec.config.layers):
        pytest.skip("attention with soft cap or sinks, and linear attention, never meet torch's plain kernel")
    settings = settings_of(spec, trained)
    count = FlopCount.of(spec, settings)
    attention = count.batch(batch).model - replace(count, pairs={}).batch(batch).model
    assert attention > 0
    # narrow values are padded to the keys' width for the kernel
    padding = sum(_padding(layer.attention) for layer in spec.config.layers)
    squares = float(sum(length**2 for length in (5, 1, 9)))
    assert counted(model_of(spec, settings), batch, plain_attention=True) == (
        count.batch(batch).model + attention + padding * squares
    )


def _has_no_plain_kernel(own: Mixer) -> bool:
    return isinstance(own, GatedDeltaConfig) or (
        isinstance(own, AttentionConfig) and (own.softcap is not None or own.sinks)
    )


def _padding(own: Mixer) -> float:
    """FLOPs of a pair for the zeros behind latent values."""
    if not isinstance(own, LatentAttentionConfig):
        return 0.0
    return 3 * 2.0 * own.num_attention_heads * (own.nope_dim + own.rope.dims - own.value_dim)


def test_a_frozen_model_below_its_lowest_adapter_costs_a_forward() -> None:
    spec = spec_of("llama")
    one, full = FlopCount.of(spec, settings_of(spec, "one")), FlopCount.of(spec)
    for part in (lambda count: count.token.model, lambda count: count.pairs[None].model):
        # two of four layers have no backward, the third none but its output projection's and the feed-forward's
        assert part(full) / 3 < part(one) < part(full) * 2 / 3
    # the head is frozen, and its input has a gradient: two products of three
    assert one.supervised.model == full.supervised.model * 2 / 3


def test_recomputing_compiled_blocks_runs_their_projections_again() -> None:
    spec = spec_of("llama")
    eager, compiled = (FlopCount.of(spec, None, Recomputing("selective", compiled=it)) for it in (False, True))
    assert eager.token.recomputed == 0
    # every projection once more, attention kept
    assert compiled.token.recomputed == compiled.token.model / 3
    assert compiled.pairs[None].recomputed == 0


@pytest.mark.parametrize("trained", ["full", "blocks"])
def test_a_score_is_counted_once_a_document_as_torch_does(trained: str) -> None:
    spec, batch = with_score_head(spec_of("llama")), batch_of()
    settings, ends = settings_of(spec, trained), torch.from_numpy(batch.cu_seqlens[1:]).long() - 1
    count = FlopCount.of(spec, settings)
    # forward, and gradients of the row and of the hidden state: the head is trained beside adapters, too
    assert count.document.model == 3 * 2 * spec.config.hidden_size
    assert count.supervised.model == 0.0
    model, on = model_of(spec, settings), to_torch(batch)
    own = {torch.ops.aten.addmm_: _in_place}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        arguments = on.token_ids, on.positions, on.cu_seqlens, on.max_seqlen
        model(*arguments, lambda hidden, head: head.logits(hidden[ends])).sum().backward()
    assert counter.get_total_flops() == replace(count, pairs={}).batch(batch).model
