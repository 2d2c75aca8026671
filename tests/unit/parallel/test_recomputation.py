"""Recomputation gives the same bits from less memory, and ``selective`` computes no product again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.heads import hidden_states
from posttrain_lib.models.lora import apply_lora
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.parallel.recomputation import ATTENTION, PRODUCTS, recompute_blocks
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.held_bytes import HeldBytes
from tests.support.lora_cases import everything_of, scramble
from tests.support.packed_row import gradients, row_of, run_row
from tests.support.tiny_models import CASES

CPU = torch.device("cpu")
MODES = ("none", "selective", "full")
LENGTHS = (50, 10, 70, 62)


def load(folder: Path, mode: Any, *, lora: bool = False) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    if lora:
        model = apply_lora(model, everything_of(model))
        scramble(model)
    return apply_parallelism(model, mesh=rank_mesh(MeshSpec(), CPU), activation_checkpointing=mode)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_same_bits_from_less_memory(case: str, lora: bool, family_folder: Callable[[str], Path]) -> None:
    held, results = [], []
    for mode in MODES:
        model = load(family_folder(case), mode, lora=lora)
        with HeldBytes() as bytes_of:
            hidden = model(*row_of(LENGTHS), hidden_states)
        held.append(bytes_of.held())
        hidden.square().sum().backward()
        results.append((hidden.detach(), gradients(model)))
    assert held[0] > held[1] > held[2]
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def assert_equal(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert torch.equal(found[0], expected[0])
    assert list(found[1]) == list(expected[1])
    for name, grad in expected[1].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("case", ["qwen3", "mixtral", "qwen3_next"])
def test_same_bits_under_autocast(case: str, family_folder: Callable[[str], Path]) -> None:
    results = []
    for mode in MODES:
        model = load(family_folder(case), mode)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            results.append(run_row(model, LENGTHS))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


class Calls(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["llama", "gpt_oss", "deepseek_v3"])
def test_selective_computes_nothing_again_that_it_keeps(case: str, family_folder: Callable[[str], Path]) -> None:
    """Biases, sinks, windows, latents: the backward runs as many products and attention kernels as without."""
    backward: dict[str, dict[str, int]] = {}
    for mode in MODES:
        hidden = load(family_folder(case), mode)(*row_of(LENGTHS), hidden_states)
        with Calls() as calls:
            hidden.sum().backward()
        backward[mode] = {name: count for name, count in calls.counts.items() if name in ATTENTION or name in PRODUCTS}
        assert calls.counts["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] > 0
    assert backward["selective"] == backward["none"]
    assert sum(backward["full"].values()) > sum(backward["none"].values())
    assert backward["full"]["aten::_scaled_dot_product_flash_attention_for_cpu"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_names_and_evaluation_are_untouched(mode: str, family_folder: Callable[[str], Path]) -> None:
    plain, model = load(family_folder("qwen3"), "none"), load(family_folder("qwen3"), mode)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(*row_of(LENGTHS)), plain(*row_of(LENGTHS)))


def test_an_unknown_mode_is_refused(family_folder: Callable[[str], Path]) -> None:
    model = build_model(spec_from_folder(family_folder("qwen3")), device="meta")
    with pytest.raises(ValueError, match="'some' is none of 'none', 'selective', 'full'"):
        recompute_blocks(model, "some")  # type: ignore[arg-type]
