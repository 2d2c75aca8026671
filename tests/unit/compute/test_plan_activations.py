"""The count of what blocks keep, against the storages that are alive after their forward."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from posttrain_lib.compute.plan_activations import Kept, Recomputation, Setting, block_kept
from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.lora import LoraSettings, apply_lora
from posttrain_lib.models.spec import LayerConfig, ModelSpec
from posttrain_lib.ops.attention import DocumentLayout, has_arithmetic
from posttrain_lib.parallel.recomputation import recompute_blocks
from posttrain_lib.training.device import autocast
from tests.support.live_storages import LiveStorages
from tests.support.tiny_models import CASES

CPU = torch.device("cpu")
EMULATED = not has_arithmetic(CPU, torch.bfloat16)
#: what the count leaves out: per-expert boundaries, gates of one number, convolution indices. Small beside anything of
#: a real width, but the tiny cases have 32
MARGIN = 0.03
MID: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def measured(spec: ModelSpec, layer: int, mode: Recomputation, precision: str, documents: list[int], lora: Any) -> int:
    """Bytes alive after the forward of one block, its output left out."""
    model = build_model(spec)
    if lora is not None:
        model = apply_lora(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    recompute_blocks(model, mode)
    cu_seqlens = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    layout = DocumentLayout.of(cu_seqlens, max(documents))
    positions = torch.cat([torch.arange(length) for length in documents])
    tables = model.rope_tables(positions, cu_seqlens)
    stream = torch.randn(sum(documents), spec.config.hidden_size, requires_grad=True)
    live = LiveStorages(model)
    with live, autocast(CPU, precision):
        output = model.layers[layer](stream * 1.0, tables, layout)
    return live.alive_bytes() - output.untyped_storage().nbytes()


def counted(spec: ModelSpec, layer: LayerConfig, precision: str, documents: list[int], lora: Any) -> Kept:
    setting = Setting(
        product_bytes=2 if precision == "bf16" else 4,
        trained=lora is None,
        adapter_rank=0 if lora is None else lora.rank,
        documents=len(documents),
        longest=max(documents),
        emulated=EMULATED,
    )
    return block_kept(spec.config, layer, setting)


def check(spec: ModelSpec, precision: str, documents: list[int], lora: Any = None) -> None:
    for number, layer in enumerate(spec.config.layers):
        if layer in spec.config.layers[:number]:
            continue
        kept = counted(spec, layer, precision, documents, lora)
        for mode in get_args(Recomputation):
            found = measured(spec, number, mode, precision, documents, lora)
            expected = kept.per_token[mode] * sum(documents) + kept.fixed[mode]
            assert expected == pytest.approx(found, rel=MARGIN), f"layer {number}, {mode}, {layer}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_and_mode(case: str, precision: str) -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES[case]})
    check(spec, precision, [64, 64, 64])
    check(spec, precision, [128])


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_a_middle_sized_model(case: str) -> None:
    """Where widths dominate, a count that fits tiny sizes by chance would not."""
    raw = {**TINY_SIZES, **CASES[case], **MID}
    raw.pop("layer_types", None)
    check(spec_from_config(raw), "bf16", [256, 256])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_on_a_frozen_base(precision: str) -> None:
    """A frozen projection keeps no input of its own, its adapter does."""
    spec = spec_from_config({**TINY_SIZES, **CASES["llama, tied"]})
    check(spec, precision, [128], LoraSettings(rank=8, alpha=16.0))


def test_what_tensor_ranks_share_is_kept_in_parts() -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama, tied"]})
    layer = spec.config.layers[0]
    whole = block_kept(spec.config, layer, Setting()).per_token
    halved = block_kept(spec.config, layer, Setting(tensor=2)).per_token
    stream = 4.0 * spec.config.hidden_size
    assert halved["full"] == whole["full"] == stream
    assert whole["none"] / 2 < halved["none"] < whole["none"]


def test_fused_kernels_keep_less() -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama, tied"]})
    layer = spec.config.layers[0]
    setting = Setting(product_bytes=2, documents=4)
    plain, fused = (block_kept(spec.config, layer, s) for s in (setting, Setting(product_bytes=2, cuda=True)))
    assert fused.per_token["none"] < plain.per_token["none"]
