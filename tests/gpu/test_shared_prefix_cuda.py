"""Shared beginnings on a CUDA device, against the table of all pairs on the CPU and against the documents alone.

Needs PyTorch, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``).

Tolerances as in ``test_ops_cuda.py``: float32 2e-5 of the largest entry, bfloat16 4 of its epsilons. The gather is a
copy, and copies' gradients are summed in float32. Missing or surplus keys move results by the size of the values.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.models.decoder import build_model  # noqa: E402
from posttrain_lib.models.families import spec_from_config  # noqa: E402
from posttrain_lib.models.heads import hidden_states  # noqa: E402
from posttrain_lib.models.scratch import init_weights  # noqa: E402
from posttrain_lib.ops.attention import DocumentLayout, has_fused_varlen, packed_attention  # noqa: E402
from posttrain_lib.schema.shared_prefix import SharedPrefixes  # noqa: E402
from tests.oracles.prefix_tree import dense_attention, documents, row_of  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 4 * 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(RELATIVE), ids=["fp32", "bf16"])
#: tiles of 64 and 128 rows are crossed by contexts, by own tokens and by neither; the last one is another document
TREE = ((-1, 0, 200), (0, 130, 70), (0, 200, 1), (1, 199, 300), (3, 64, 129), (-1, 0, 5), (5, 5, 64))


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    """No TF32: the float32 bounds above are float32's."""
    torch.backends.cuda.matmul.allow_tf32 = False


def on_device() -> tuple[torch.Tensor, torch.Tensor, int, SharedPrefixes]:
    """(positions, cu_seqlens, longest segment, paths) of the tree, tensors on the GPU."""
    cu_seqlens, positions, parents = row_of(TREE)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents)
    moved = prefixes.map(lambda array: torch.from_numpy(array).cuda())
    return positions.cuda(), cu_seqlens.cuda(), int(cu_seqlens.diff().max()), moved


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Largest difference against the largest entry."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    worst, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert worst <= RELATIVE[dtype] * size, f"{what}: off by {worst:.3g} where entries reach {size:.3g}"


@DTYPES
@pytest.mark.parametrize("window", [None, 2, 17, 150])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_attention_and_its_gradients(dtype: torch.dtype, window: int | None, heads: tuple[int, int]) -> None:
    tokens = sum(length for _, _, length in TREE)
    # rounded to the dtype first, so that both sides start from the same numbers
    start = [torch.randn(tokens, count, 64).to(dtype) for count in (heads[0], heads[1], heads[1])]
    pull = torch.randn(start[0].shape).to(dtype)
    expected_inputs = [value.double().requires_grad_() for value in start]
    expected = dense_attention(*expected_inputs, TREE, 0.125, window)
    expected.backward(pull.double())

    _, cu_seqlens, longest, prefixes = on_device()
    fused = has_fused_varlen(cu_seqlens.device, dtype)
    assert fused == (dtype == torch.bfloat16)
    layout = DocumentLayout.of(cu_seqlens, longest, fused=fused, prefixes=prefixes)
    found_inputs = [value.cuda().requires_grad_() for value in start]
    found = packed_attention(*found_inputs, layout, longest, scale=0.125, window=window)
    found.backward(pull.cuda())

    assert found.dtype == dtype
    assert_near(found, expected, dtype, "output")
    for name, one, other in zip(("query", "key", "value"), found_inputs, expected_inputs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_near(one.grad, other.grad, dtype, f"gradient of the {name}")


def test_a_prompts_gradient_is_summed_in_float32() -> None:
    """600 completions of one token each give the prompt's value half of their pull: in bfloat16 the sum of halves would
    stop growing at 128, where a half is below its resolution."""
    cu_seqlens, positions, parents = row_of([(-1, 0, 1), *[(0, 1, 1)] * 600])
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(lambda array: torch.from_numpy(array).cuda())
    layout = DocumentLayout.of(cu_seqlens.cuda(), 1, fused=True, prefixes=prefixes)
    query = torch.zeros(601, 1, 64, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn_like(query), torch.randn_like(query).requires_grad_()
    output = packed_attention(query, key, value, layout, 1, scale=1.0)
    (found,) = torch.autograd.grad(output, value, torch.ones_like(output))
    assert (found[0].float() - 301).abs().max() <= 1  # the resolution at 301 is 2


@DTYPES
def test_a_decoder_is_its_documents_alone(dtype: torch.dtype) -> None:
    """Outputs and gradients of the row against its documents one by one, on the same device and dtype."""
    spec = spec_from_config(
        {
            "model_type": "qwen3",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
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
    )
    model = build_model(spec, dtype=dtype, device="cuda")
    init_weights(model, spec, seed=0)
    positions, cu_seqlens, longest, prefixes = on_device()
    token_ids = torch.randint(512, positions.shape, device="cuda")
    pull = torch.randn(len(positions), 128, device="cuda", dtype=dtype)

    shared = model(token_ids, positions, cu_seqlens, longest, hidden_states, prefixes=prefixes)
    shared.backward(pull)
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for document, (_, cut, _) in zip(documents(TREE), TREE, strict=True):
        places = torch.tensor(document, device="cuda")
        ends = torch.tensor([0, len(document)], dtype=torch.int32, device="cuda")
        alone = model(token_ids[places], torch.arange(len(document)).cuda(), ends, len(document), hidden_states)[cut:]
        assert_near(shared[places[cut:]], alone, dtype, f"hidden states of the document of {len(document)} tokens")
        alone.backward(pull[places[cut:]])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(together[name], parameter.grad, dtype, f"gradient of {name}")
