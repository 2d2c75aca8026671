from __future__ import annotations

import importlib

import pytest
import torch

from posttrain_lib.models.spec import RopeConfig
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.rope import apply_rope, inverse_frequencies, rope_tables
from posttrain_lib.ops.swiglu import GATED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3.modeling_qwen3.Qwen3RMSNorm", {}),
        ("olmo3.modeling_olmo3.Olmo3RMSNorm", {"late_cast": True}),
        ("gemma2.modeling_gemma2.Gemma2RMSNorm", {"late_cast": True, "plus_one": True}),
    ],
)
def test_norm_has_the_bits_of_transformers(name, options, dtype):
    module, _, kind = name.rpartition(".")
    torch.manual_seed(0)
    theirs = getattr(importlib.import_module(f"transformers.models.{module}"), kind)(24, eps=1e-5)
    theirs.weight.data.normal_(1.0, 0.3)
    theirs = theirs.to(dtype)
    hidden = torch.randn(9, 24).to(dtype)
    assert torch.equal(rms_norm(hidden, theirs.weight, 1e-5, **options), theirs(hidden))


@pytest.mark.parametrize("late_cast", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norm_gives_back_the_dtype_of_its_input(plus_one, late_cast):
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(8).bfloat16()
    got = rms_norm(hidden, weight, 1e-6, plus_one=plus_one, late_cast=late_cast)
    exact = rms_norm(hidden.double(), weight.double(), 1e-6, plus_one=plus_one, late_cast=late_cast)
    assert got.dtype == torch.bfloat16
    # Three roundings to 8 bits at the most: of the factor, of the normalised value, and of their product.
    torch.testing.assert_close(got.double(), exact, rtol=3 * 2**-8, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"late_cast": True}, {"late_cast": True, "plus_one": True}, {"plus_one": True}]
)
def test_norm_gradients_by_finite_differences(options):
    hidden = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-3, **options), (hidden, weight))


def test_norm_gradients_in_bfloat16_are_near_the_exact_ones():
    hidden = torch.randn(5, 16).bfloat16().requires_grad_()
    weight = torch.randn(16).bfloat16().requires_grad_()
    exact = [item.detach().double().requires_grad_() for item in (hidden, weight)]
    pull = torch.randn(5, 16)
    got = torch.autograd.grad(rms_norm(hidden, weight, 1e-6), (hidden, weight), pull.bfloat16())
    wanted = torch.autograd.grad(rms_norm(*exact, 1e-6), exact, pull.bfloat16().double())
    for left, right in zip(got, wanted, strict=True):
        assert left.dtype == torch.bfloat16
        # One rounding to 8 bits of the result, after a computation in float32.
        torch.testing.assert_close(left.double(), right, rtol=2**-7, atol=1e-3)


def test_norm_keeps_float64():
    hidden, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    exact = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-6), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(1e6, 64), {"rope_type": "default", "rope_theta": 1e6}),
        (RopeConfig(1e4, 64, "linear", factor=4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        (
            RopeConfig(5e5, 64, "llama3", False, 32.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            RopeConfig(1.5e5, 64, "yarn", factor=32.0, original_max_position_embeddings=4096, attention_factor=1.25),
            {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "attention_factor": 1.25,
            },
        ),
        (
            RopeConfig(
                1e4, 64, "yarn", factor=4.0, original_max_position_embeddings=512, truncate=False, beta_fast=16.0
            ),
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "attention_factor": 1.0,
                "truncate": False,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_has_the_bits_of_transformers(rope, parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(rope), theirs.inv_freq)
    positions = torch.tensor([0, 1, 5, 4000, 100_000])
    heads = torch.randn(5, 4, 64)
    cosine, sine = theirs(heads, positions[None])
    wanted, _ = apply_rotary_pos_emb(heads[None], heads[None], cosine, sine, unsqueeze_dim=2)
    got = apply_rope(heads, *rope_tables(positions, inverse_frequencies(rope), rope.attention_factor))
    # Same products and sums; a fused multiply-add in either may round once less: 2 roundings of values up to 5.
    torch.testing.assert_close(got, wanted[0], rtol=0, atol=1e-6)


def test_part_of_a_head_turns_and_neighbours_may_be_pairs():
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb

    positions, heads = torch.tensor([0, 3, 70]), torch.randn(3, 2, 16)
    cosine, sine = rope_tables(positions, inverse_frequencies(RopeConfig(1e4, 8)))
    whole = [torch.cat([table, table], dim=-1)[None, :, 0] for table in (cosine, sine)]
    wanted, _ = apply_rotary_pos_emb(heads[None], heads[None], *whole, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rope(heads, cosine, sine, interleaved=True), wanted[0], rtol=0, atol=1e-6)
    halves = apply_rope(heads, cosine, sine)
    assert torch.equal(halves[..., 8:], heads[..., 8:])
    assert torch.equal(halves[..., :8], apply_rope(heads[..., :8], cosine, sine))


def test_rope_stays_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine, sine = rope_tables(torch.arange(5000), torch.tensor([1.0, 0.1]))
        assert cosine.dtype == sine.dtype == torch.float32
        assert apply_rope(torch.randn(5000, 1, 4).bfloat16(), cosine, sine).dtype == torch.bfloat16
    torch.testing.assert_close(cosine[:, 0, 0], torch.arange(5000.0).cos())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", lambda gate: gate * torch.sigmoid(gate)),
        ("gelu", lambda gate: gate * (1 + torch.erf(gate / 2**0.5)) / 2),
        ("gelu_tanh", lambda gate: gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2),
    ],
)
def test_gated_activations(name, expected):
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(GATED[name](gate, up), expected(gate) * up)
