from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.adapters.hf_reference import load_reference, reference_logits
from posttrain_lib.checkpoint.hf import load_hf_weights, stored_tensors
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.heads import hidden_states
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.models.spec import matmul_parameters, parameter_count
from tests.support.tiny_models import CASES

LENGTHS = (5, 1, 40, 12)


def _load(folder, dtype=torch.float32):
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=dtype)
    load_hf_weights(model, spec, folder)
    return spec, model


def _row(lengths, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return token_ids, positions, cu_seqlens, max(lengths)


def test_float32_logits_are_transformers_up_to_its_own_noise(tiny):
    spec, model = _load(tiny)
    row = _row(LENGTHS, spec.config.vocab_size)
    reference = load_reference(tiny, dtype=torch.float32)
    coarse = torch.cat([reference_logits(reference, part) for part in row[0].split(LENGTHS)])
    reference = reference.double()
    fine = torch.cat([reference_logits(reference, part) for part in row[0].split(LENGTHS)])
    floor = (coarse - fine).abs().max()
    with torch.no_grad():
        assert (model(*row) - fine).abs().max() <= 8 * floor  # checkpoint/verify_modules.py says why 8


def test_float64_gradients_are_those_of_transformers(tiny):
    spec, model = _load(tiny, torch.float64)
    row = _row((14,), spec.config.vocab_size)
    pull = torch.randn(14, spec.config.vocab_size, dtype=torch.float64)
    (model(*row) * pull).sum().backward()
    reference = load_reference(tiny, dtype=torch.float64)
    (reference(input_ids=row[0][None], use_cache=False).logits[0] * pull).sum().backward()
    theirs = dict(reference.named_parameters())
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in stored_tensors(spec, grads, torch.float64).items():
        expected = theirs[name].grad
        # transformers' norms compute in float32 whatever the model's dtype: 2^-24, times depth and cancellation.
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_rounding_to_bfloat16_stays_near_transformers(tiny):
    spec, model = _load(tiny, torch.bfloat16)
    row = _row((30,), spec.config.vocab_size)
    exact = reference_logits(load_reference(tiny, dtype=torch.float64), row[0])
    theirs = reference_logits(load_reference(tiny, dtype=torch.bfloat16), row[0])
    with torch.no_grad():
        ours = model(*row)
    assert ours.dtype == torch.bfloat16
    # Noise of two different bfloat16 computations of one thing: of one size, so within a factor of 2.
    assert (ours - exact).pow(2).mean().sqrt() <= 2 * (theirs - exact).pow(2).mean().sqrt()


@pytest.mark.parametrize("name", ["llama-3.2", "qwen2-windows", "qwen3"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_packed_is_alone_outputs_and_gradients(name, lengths, seed, tiny_folder):
    spec, model = _load(tiny_folder(name), torch.float64)
    token_ids, positions, cu_seqlens, longest = _row(lengths, spec.config.vocab_size, seed)
    pull = torch.randn(len(token_ids), spec.config.vocab_size, dtype=torch.float64)
    packed = model(token_ids, positions, cu_seqlens, longest)
    (packed * pull).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in range(len(lengths)):
        here = slice(int(cu_seqlens[part]), int(cu_seqlens[part + 1]))
        alone = model(*_row_of(token_ids[here]))
        torch.testing.assert_close(packed[here], alone, rtol=0, atol=1e-12)
        (alone * pull[here]).sum().backward()
    for name, parameter in model.named_parameters():
        limit = 1e-12 * max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(together[name], parameter.grad, rtol=0, atol=limit)


def _row_of(token_ids):
    length = len(token_ids)
    return token_ids, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length


def test_parameters_are_the_specs(tiny):
    spec, model = _load(tiny)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == spec.parameter_shapes()
    assert list(shapes) == list(spec.parameter_shapes())
    assert parameter_count(spec.config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_is_the_embedding(tiny_folder):
    spec, model = _load(tiny_folder("qwen3"))
    assert model.lm_head is None
    assert model.head_weight is model.embed_tokens.weight
    assert "lm_head.weight" not in spec.parameter_shapes()
    _, untied = _load(tiny_folder("llama"))
    assert untied.head_weight is untied.lm_head.weight


def test_output_sees_normed_hidden_states_and_head(tiny_folder):
    spec, model = _load(tiny_folder("llama"))
    row = _row((4, 3), spec.config.vocab_size)
    seen = {}

    def output(hidden, head):
        seen.update(hidden=hidden.shape, weight=head.weight_VD)
        return "whatever the output returns"

    assert model(*row, output) == "whatever the output returns"
    assert seen["hidden"] == (7, spec.config.hidden_size)
    assert seen["weight"] is model.lm_head.weight
    with torch.no_grad():
        assert torch.equal(model(*row), model(*row, hidden_states) @ model.head_weight.t())


def test_unloaded_weights_are_nan_and_meta_allocates_nothing(tiny_folder):
    spec = spec_from_folder(tiny_folder("qwen2"))
    assert all(parameter.isnan().all() for parameter in build_model(spec).parameters())
    assert all(parameter.is_meta for parameter in build_model(spec, device="meta").parameters())
    model = build_model(spec)
    init_weights(model, spec, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_autocast_bfloat16_is_near_float32(tiny_folder):
    spec, model = _load(tiny_folder("qwen3"))
    row = _row(LENGTHS, spec.config.vocab_size)
    with torch.no_grad():
        exact = model(*row)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(*row)
    error = (half - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 1e-4 < error < 0.05  # bfloat16 rounds to 2^-9 = 0.002, some tens of times in a row


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "qwen2"])
def test_matmul_parameters_are_what_the_flop_counter_sees(name, tiny_folder):
    from torch.utils.flop_counter import FlopCounterMode

    spec, model = _load(tiny_folder(name))
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*_row((length,), spec.config.vocab_size))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert products == 2 * length * sum(matmul_parameters(spec))


def test_published_sizes(real_data):
    # Parameter counts as the models' own pages state them, to the digits that they give.
    for name, billions in [("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03), ("qwen2.5-0.5b", 0.49), ("qwen3-0.6b", 0.6)]:
        folder = real_data / "model_configs" / name
        assert json.loads((folder / "config.json").read_text())
        assert round(parameter_count(spec_from_folder(folder).config) / 1e9, 2) == billions


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_packs_without_a_leak(case, family_folder):
    """Outputs of each document, and the gradient of its own outputs, know nothing of the others'."""
    spec, model = _load(family_folder(case), torch.float64)
    lengths = (3, 1, 21, 12)
    token_ids, positions, cu_seqlens, longest = _row(lengths, spec.config.vocab_size)
    pull = torch.randn(len(token_ids), spec.config.vocab_size, dtype=torch.float64)
    pull[: int(cu_seqlens[2])] = 0.0
    pull[int(cu_seqlens[3]) :] = 0.0
    packed = model(token_ids, positions, cu_seqlens, longest)
    (packed * pull).sum().backward()
    together = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    here = slice(int(cu_seqlens[2]), int(cu_seqlens[3]))
    alone = model(*_row_of(token_ids[here]))
    (alone * pull[here]).sum().backward()
    # Float64 rounding through four layers; a leak is of order 1. Linear attention sums other chunks of other lengths.
    torch.testing.assert_close(packed[here], alone, rtol=0, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            limit = 1e-9 * max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(together[name], parameter.grad, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_matmul_parameters_of_every_kind_of_layer_are_what_the_flop_counter_sees(case, family_folder):
    from torch.utils.flop_counter import FlopCounterMode

    spec, model = _load(family_folder(case))
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*_row((length,), spec.config.vocab_size))
    by_op: dict[str, int] = {}
    for module, counts in counter.get_flop_counts().items():
        # Attention's own products have no parameters; those of the delta rule and its chunks are batched.
        if module == "Global":
            by_op = {str(op): count for op, count in counts.items()}
    products = sum(count for op, count in by_op.items() if op in ("aten.mm", "aten.addmm"))
    assert products == 2 * length * sum(matmul_parameters(spec))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_routing_correction_is_float32_at_least(dtype, wide, family_folder):
    model = build_model(spec_from_folder(family_folder("deepseek_v3")), dtype)
    assert torch.get_default_dtype() == torch.float32
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    corrections = {name for name in kinds if name.endswith("correction_bias")}
    assert corrections
    assert all(kind == (wide if name in corrections else dtype) for name, kind in kinds.items())
