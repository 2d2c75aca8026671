"""The tensor operations and a small decoder on a CUDA device, against the readable versions on the CPU.

Needs PyTorch, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``).

Tolerances. float32: both sides round differently ordered sums of at most a few thousand terms of size about 1; 2e-5
relative to the largest entry is some 170 times float32's epsilon, an order above what such sums lose. bfloat16: its
epsilon is 2^-8, and an output or gradient passes through a handful of roundings (probabilities, products, sum, the
result itself), each half an epsilon of the largest entry: 4 epsilon bounds them with some room. A wrong mask, a missing
scale or a token of the neighbour's moves results by the size of the values themselves.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.models.decoder import build_model  # noqa: E402
from posttrain_lib.models.families import spec_from_config  # noqa: E402
from posttrain_lib.models.scratch import init_weights  # noqa: E402
from posttrain_lib.ops.attention import has_fused_varlen, packed_attention  # noqa: E402
from posttrain_lib.ops.head_divergence import linear_divergence  # noqa: E402
from posttrain_lib.ops.head_reference import (  # noqa: E402
    linear_cross_entropy_reference,
    linear_divergence_reference,
    token_logprobs_reference,
)
from posttrain_lib.ops.head_topk import top_logprobs  # noqa: E402
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs  # noqa: E402
from posttrain_lib.ops.output_head import OutputHead  # noqa: E402
from posttrain_lib.ops.reference import packed_attention_reference  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LENGTHS = (5, 1, 130, 64, 300)
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 4 * 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(RELATIVE), ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    """No TF32: the float32 bounds above are float32's."""
    torch.backends.cuda.matmul.allow_tf32 = False


def boundaries(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Largest difference against the largest entry."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    worst, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert worst <= RELATIVE[dtype] * size, f"{what}: off by {worst:.3g} where entries reach {size:.3g}"


@DTYPES
@pytest.mark.parametrize("window", [None, 17])
def test_packed_attention_and_its_gradients(dtype: torch.dtype, window: int | None) -> None:
    tokens, heads, kv_heads, head_dim = sum(LENGTHS), 8, 2, 64
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    # rounded to the dtype first, so that both sides start from the same numbers
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    pull = torch.randn(shapes[0]).to(dtype)
    layout = boundaries(LENGTHS)

    expected_inputs = [value.double().requires_grad_() for value in start]
    expected = packed_attention_reference(*expected_inputs, layout, max(LENGTHS), scale=head_dim**-0.5, window=window)
    expected.backward(pull.double())
    found_inputs = [value.cuda().requires_grad_() for value in start]
    found = packed_attention(*found_inputs, layout.cuda(), max(LENGTHS), scale=head_dim**-0.5, window=window)
    found.backward(pull.cuda())

    assert found.dtype == dtype
    assert_near(found, expected, dtype, "output")
    for name, one, other in zip(("query", "key", "value"), found_inputs, expected_inputs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_near(one.grad, other.grad, dtype, f"gradient of the {name}")


def test_half_precision_takes_the_fused_path() -> None:
    """Else the test above would not test it."""
    assert has_fused_varlen(torch.device("cuda"), torch.bfloat16)
    assert not has_fused_varlen(torch.device("cuda"), torch.float32)


@DTYPES
@pytest.mark.parametrize("chunk_tokens", [None, 37])
def test_linear_cross_entropy_and_its_gradients(dtype: torch.dtype, chunk_tokens: int | None) -> None:
    tokens, hidden_size, vocabulary, real = 300, 64, 1031, 1024
    hidden = torch.randn(tokens, hidden_size).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size) * hidden_size**-0.5).to(dtype)
    targets = torch.randint(real, (tokens,))
    weights = torch.rand(tokens)
    supervised = torch.arange(0, tokens, 3)

    expected_inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected, expected_nll = linear_cross_entropy_reference(
        expected_inputs[0], OutputHead(expected_inputs[1], real), targets, weights.double(), supervised
    )
    expected.backward()
    found_inputs = [hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    found, found_nll = linear_cross_entropy(
        found_inputs[0],
        OutputHead(found_inputs[1], real),
        targets.cuda(),
        weights.cuda(),
        supervised.cuda(),
        chunk_tokens=chunk_tokens,
    )
    found.backward()

    assert found.dtype == torch.float32
    assert_near(found, expected, dtype, "loss")
    assert_near(found_nll, expected_nll, dtype, "loss per position")
    for name, one, other in zip(("hidden states", "head"), found_inputs, expected_inputs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_near(one.grad, other.grad, dtype, f"gradient of the {name}")


@DTYPES
def test_logprobs_entropies_divergence_and_the_most_likely(dtype: torch.dtype) -> None:
    """The head's other operations, with a soft cap and a padded vocabulary."""
    tokens, hidden_size, vocabulary, real = 300, 64, 1031, 1024
    start = [torch.randn(tokens, hidden_size), torch.randn(vocabulary, hidden_size) * hidden_size**-0.5]
    start = [tensor.to(dtype) for tensor in start]
    teacher = [tensor.flip(0) for tensor in start]
    targets, weights, index = torch.randint(real, (tokens,)), torch.rand(tokens), torch.arange(0, tokens, 3)

    def head(weight: torch.Tensor) -> OutputHead:
        return OutputHead(weight, real, softcap=5.0)

    wide = [tensor.double().requires_grad_() for tensor in start]
    logprobs, entropy = token_logprobs_reference(wide[0], head(wide[1]), targets, index)
    other = [tensor.double() for tensor in teacher]
    inputs = (wide[0], head(wide[1]), other[0], head(other[1]), weights.double(), index)
    divergence, _ = linear_divergence_reference(*inputs)
    ((logprobs + entropy).sum() + divergence).backward()

    ours = [tensor.cuda().requires_grad_() for tensor in start]
    other = [tensor.cuda() for tensor in teacher]
    targets, weights, index = targets.cuda(), weights.cuda(), index.cuda()
    found, found_entropy = token_logprobs(ours[0], head(ours[1]), targets, index, with_entropy=True, chunk_tokens=37)
    found_divergence, _ = linear_divergence(ours[0], head(ours[1]), other[0], head(other[1]), weights, index)
    assert found_entropy is not None
    ((found + found_entropy).sum() + found_divergence).backward()

    assert_near(found, logprobs, dtype, "log-probs")
    assert_near(found_entropy, entropy, dtype, "entropies")
    assert_near(found_divergence, divergence, dtype, "divergence")
    for name, one, two in zip(("hidden states", "head"), ours, wide, strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert_near(one.grad, two.grad, dtype, f"gradient of the {name}")
    best, ids = top_logprobs(ours[0], head(ours[1]), index, 5)
    picked, _ = token_logprobs(
        ours[0], head(ours[1]), torch.zeros(tokens).long().cuda().index_copy(0, index, ids[:, 0]), index
    )
    assert_near(best[:, 0], picked, dtype, "the most likely token's log-prob")
    assert (best.diff(dim=1) <= 0).all()


def test_no_supervised_position_is_a_zero_with_a_gradient() -> None:
    hidden = torch.randn(8, 16, device="cuda", requires_grad=True)
    weight = torch.randn(32, 16, device="cuda", requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    loss, nll = linear_cross_entropy(
        hidden, OutputHead(weight), torch.zeros(8, dtype=torch.int64).cuda(), torch.ones(8).cuda(), none
    )
    loss.backward()
    assert float(loss) == 0.0
    assert nll.numel() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.fixture
def config() -> dict[str, object]:
    """A Qwen3 of 3 layers with grouped heads of 64, as a config.json has it."""
    return {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.1,  # large enough that attention is far from uniform
    }


@DTYPES
def test_a_decoder_packed_is_alone(dtype: torch.dtype, config: dict[str, object]) -> None:
    """Outputs and gradients of a packed row against its documents run one by one, on the same device and dtype.

    Same kernels, other block shapes: sums differ in order, so the bounds are as above, on the largest entry.
    """
    spec = spec_from_config(config)
    model = build_model(spec, dtype=dtype, device="cuda")
    init_weights(model, spec, seed=0)
    token_ids = torch.randint(spec.config.vocab_size, (sum(LENGTHS),), device="cuda")
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).cuda()
    pull = torch.randn(sum(LENGTHS), spec.config.vocab_size, device="cuda", dtype=dtype)

    packed = model(token_ids, positions, boundaries(LENGTHS).cuda(), max(LENGTHS))
    packed.backward(pull)
    packed_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    alone = []
    for ids, places, part in zip(token_ids.split(LENGTHS), positions.split(LENGTHS), pull.split(LENGTHS), strict=True):
        logits = model(ids, places, boundaries((len(ids),)).cuda(), len(ids))
        logits.backward(part)
        alone.append(logits)

    assert_near(packed, torch.cat(alone), dtype, "logits")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(packed_gradients[name], parameter.grad, dtype, f"gradient of {name}")


def test_a_neighbour_changes_nothing_at_all(config: dict[str, object]) -> None:
    """The first document's logits, bit for bit, whatever tokens the second one has: the shapes stay the same."""
    spec = spec_from_config(config)
    model = build_model(spec, dtype=torch.bfloat16, device="cuda")
    init_weights(model, spec, seed=0)
    lengths = (100, 60)
    positions = torch.cat([torch.arange(length) for length in lengths]).cuda()
    first = torch.randint(512, (100,), device="cuda")
    rows = [torch.cat([first, torch.randint(512, (60,), device="cuda")]) for _ in range(2)]
    with torch.no_grad():
        one, other = (model(row, positions, boundaries(lengths).cuda(), 100) for row in rows)
    assert torch.equal(one[:100], other[:100])
    assert not torch.equal(one[100:], other[100:])
