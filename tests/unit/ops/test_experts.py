from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.errors import ModelError
from posttrain_lib.ops import experts as ops
from posttrain_lib.ops.experts import ExpertAdapter, ExpertGroups, clamped_swiglu, mixture
from posttrain_lib.ops.reference import mixture_reference
from posttrain_lib.ops.swiglu import swiglu

EXACT = {"rtol": 0, "atol": 1e-11}  # float64: 1e-16 of sums of at most hundreds of terms, some of size 100
BIASES = ("gate_bias_EF", "up_bias_EF", "down_bias_ED")


def inputs_of(tokens, choices, experts, hidden=8, forward=6, dtype=torch.float64, seed=0, reachable=None):
    """ids, and the leaves: hidden, weights of the choices, three projections, three biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, hidden), (tokens, choices), (experts, forward, hidden), (experts, forward, hidden)]
    shapes += [(experts, hidden, forward), (experts, forward), (experts, forward), (experts, hidden)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    order = torch.rand(tokens, reachable or experts, generator=generator).argsort(1)
    return order[:, :choices], leaves


def run(operation, ids, leaves, activation, biased=True, **more):
    hidden, weights, gate, up, down, *biases = leaves
    options = dict(zip(BIASES, biases, strict=True)) if biased else {}
    return operation(hidden, ids, weights, gate, up, down, activation=activation, **options, **more)


def with_gradients(output, leaves):
    pull = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, pull)]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    choices=st.integers(1, 3),
    reachable=st.integers(3, 6),
    activation=st.sampled_from([swiglu, clamped_swiglu]),
    biased=st.booleans(),
)
def test_equals_every_token_through_every_expert(tokens, choices, reachable, activation, biased):
    ids, leaves = inputs_of(tokens, choices, 6, reachable=reachable)
    used = leaves if biased else leaves[:5]
    found = with_gradients(run(mixture, ids, leaves, activation, biased), used)
    expected = with_gradients(run(mixture_reference, ids, leaves, activation, biased), used)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_gradients_by_finite_differences():
    ids, leaves = inputs_of(4, 2, 3, hidden=3, forward=2)
    assert torch.autograd.gradcheck(lambda *items: run(mixture, ids, items, swiglu), leaves)


@pytest.mark.parametrize("tokens", [0, 3])
def test_experts_without_tokens_have_gradients_of_zeros(tokens):
    ids, leaves = inputs_of(tokens, 2, 5, reachable=2)
    run(mixture, ids, leaves, swiglu).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
    for leaf in leaves[2:]:
        assert not leaf.grad[2:].any()
        assert leaf.grad[:2].any() == (tokens > 0)


def test_frozen_experts_cost_no_weight_gradient(monkeypatch):
    """As when adapters alone are trained."""
    ids, leaves = inputs_of(6, 2, 4)
    for leaf in leaves[2:]:
        leaf.requires_grad_(False)
    monkeypatch.setattr(ops, "_outer_products", lambda *_: pytest.fail("a gradient that nobody wants"))
    run(mixture, ids, leaves, swiglu).sum().backward()
    assert leaves[0].grad.any()
    assert all(leaf.grad is None for leaf in leaves[2:])


def test_adapters_are_the_merged_weights():
    ids, leaves = inputs_of(9, 2, 4)
    generator = torch.Generator().manual_seed(5)
    adapters, merged, factors = {}, list(leaves), []
    for place, name in enumerate(("gate_adapter", "up_adapter", "down_adapter"), 2):
        _, outs, ins = leaves[place].shape
        down = torch.randn(4, 2, ins, generator=generator, dtype=torch.float64, requires_grad=True)
        up = torch.randn(4, outs, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        adapters[name] = ExpertAdapter(down, up, 0.3)
        merged[place] = leaves[place] + 0.3 * (up @ down)
        factors += [down, up]
    found = with_gradients(run(mixture, ids, leaves, swiglu, **adapters), [*leaves, *factors])
    expected = with_gradients(run(mixture_reference, ids, merged, swiglu), [*leaves, *factors])
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_kernel_and_the_loop_agree(dtype, monkeypatch):
    """torch's twin of the kernel on a CPU stands in for the device's: layout, offsets and the fill of idle experts."""
    ids, leaves = inputs_of(40, 2, 6, hidden=16, forward=24, dtype=dtype, reachable=4)
    looped = with_gradients(run(mixture, ids, leaves, swiglu), leaves)
    calls = []
    monkeypatch.setattr(ops, "_has_grouped_kernel", lambda *_: calls.append(1) is None)
    monkeypatch.setattr(ExpertGroups, "slices", property(lambda _: pytest.fail("read back from the device")))
    grouped = with_gradients(run(mixture, ids, leaves, swiglu), leaves)
    assert len(calls) == 9  # three projections, each forward, for its input and for its weight
    for got, wanted in zip(grouped, looped, strict=True):
        # Same products, sums in another order: some units of the last place of the largest entry.
        unit = 4 * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=unit)


def test_idle_experts_are_filled_whatever_the_kernel_left(monkeypatch):
    ids, leaves = inputs_of(12, 2, 6, hidden=16, forward=24, dtype=torch.float32, reachable=3)
    real = torch.nn.functional.grouped_mm

    def careless(left, right, offs):
        product = real(left, right, offs=offs)
        if product.dim() == 3:
            product[3:] = float("nan")
        return product

    monkeypatch.setattr(ops, "_has_grouped_kernel", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)
    for gradient in with_gradients(run(mixture, ids, leaves, swiglu), leaves)[3:]:
        assert not gradient[3:].any()


def theirs(module, cls, leaves, **config):
    """transformers' experts with our weights, and both of its implementations of the mixture."""
    _, _, gate, up, down, gate_bias, up_bias, down_bias = (leaf.detach() for leaf in leaves)
    experts, forward, hidden = gate.shape
    sizes = {"num_experts": experts, "num_local_experts": experts, "hidden_size": hidden, "hidden_act": "silu"}
    sizes |= {"moe_intermediate_size": forward, "intermediate_size": forward}
    built = getattr(module, cls)(SimpleNamespace(**sizes, **config)).to(gate.dtype)
    if cls == "GptOssExperts":
        built.gate_up_proj.data = torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2).contiguous()
        built.down_proj.data = down.transpose(1, 2).contiguous()
        built.gate_up_proj_bias.data = torch.stack((gate_bias, up_bias), 2).flatten(1, 2)
        built.down_proj_bias.data = down_bias
    else:
        built.gate_up_proj.data, built.down_proj.data = torch.cat((gate, up), 1), down
    return built


CASES = [
    ("qwen3_moe", "Qwen3MoeExperts", swiglu, False),
    ("mixtral", "MixtralExperts", swiglu, False),
    ("deepseek_v3", "DeepseekV3NaiveMoe", swiglu, False),
    ("gpt_oss", "GptOssExperts", clamped_swiglu, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "same"])
@pytest.mark.parametrize(("name", "cls", "activation", "biased"), CASES, ids=[case[0] for case in CASES])
def test_equals_transformers(name, cls, activation, biased, weights, dtype):
    """Mixtral and DeepSeek-V3 hand over float32 weights, Qwen3 and gpt-oss those of the model's dtype."""
    import importlib

    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    ids, leaves = inputs_of(50, 3, 8, hidden=32, forward=16, dtype=dtype)
    scores = leaves[1].detach().float().softmax(1)
    leaves[1] = scores if weights == "float32" else scores.to(dtype)
    with torch.no_grad():
        found = run(mixture, ids, leaves, activation, biased)
        for implementation in ("grouped_mm", "eager"):
            built = theirs(module, cls, leaves, _experts_implementation=implementation)
            expected = built(leaves[0], ids, leaves[1])
            assert found.dtype == expected.dtype == dtype
            # Both round each projection, the bias and each factor of the activation; sums that end beside a tie may
            # round the other way, and eager rounds the sum over experts at each term: 4 units of the largest entry.
            unit = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=unit)


def test_clamped_swiglu_has_the_bits_of_transformers():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate, up = (12 * torch.randn(40, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for dtype in (torch.float32, torch.bfloat16):
        pair = torch.stack((gate, up), 2).flatten(1).to(dtype)
        expected = GptOssExperts._apply_gate(SimpleNamespace(alpha=1.702, limit=7.0), pair)
        assert torch.equal(clamped_swiglu(gate.to(dtype), up.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits(dtype):
    ids, leaves = inputs_of(300, 4, 16, hidden=64, forward=32, dtype=dtype)
    first, second = (with_gradients(run(mixture, ids, leaves, swiglu), leaves) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_bfloat16_adds_up_in_float32():
    """Eight experts that all answer the same: added in bfloat16 one after another the sum would stop growing."""
    hidden = torch.ones(1, 8, dtype=torch.bfloat16)
    ids = torch.arange(8)[None]
    weights = torch.tensor([[256.0, *[1.0] * 7]]).bfloat16()
    gate, up, down = (torch.full((8, 8, 8), value, dtype=torch.bfloat16) for value in (1.0, 0.125, 0.125))
    output = mixture(hidden, ids, weights, gate, up, down, activation=lambda gate, up: up)
    assert torch.equal(output.float(), torch.full((1, 8), 264.0))  # 263 to 8 bits; 256 + 1 + 1 + ... stays 256


def test_autocast_decides_the_dtype():
    ids, leaves = inputs_of(5, 2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(mixture, ids, leaves, swiglu)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_expert_that_does_not_exist_is_refused(wrong):
    ids, leaves = inputs_of(5, 2, 3)
    ids = ids.clone()
    ids[2, 1] = wrong
    with pytest.raises(ModelError, match="0 to 2"):
        run(mixture, ids, leaves, swiglu)
