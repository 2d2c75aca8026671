from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.reference import short_convolution_reference
from posttrain_lib.ops.short_convolution import short_convolution
from posttrain_lib.schema.shared_prefix import SharedPrefixes

CHANNELS = 5
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: at most 8 products of numbers up to about 10


def layout_of(lengths):
    return DocumentLayout.of(torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32), max(lengths))


def inputs_of(lengths, taps, dtype=torch.float64, seed=0, channels=CHANNELS):
    """hidden, weight, bias, initial state: all leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), channels), (channels, taps), (channels,), (len(lengths), channels, taps - 1)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    taps=st.sampled_from([1, 2, 4, 7]),
    activation=st.sampled_from([None, "silu"]),
    biased=st.booleans(),
    stateful=st.booleans(),
)
def test_equals_torch_per_document_in_value_and_gradient(lengths, taps, activation, biased, stateful):
    hidden, weight, bias, state = inputs_of(lengths, taps)
    leaves = [hidden, weight, *([bias] if biased else []), *([state] if stateful else [])]
    options = {
        "bias_C": bias if biased else None,
        "initial_state": state if stateful else None,
        "activation": activation,
    }
    results = []
    for outputs in (
        short_convolution(hidden, weight, layout_of(lengths), **options),
        short_convolution_reference(hidden, weight, lengths, **options),
    ):
        pulls = [torch.linspace(-1, 1, item.numel(), dtype=item.dtype).view(item.shape) for item in outputs]
        loss = sum((item * pull).sum() for item, pull in zip(outputs, pulls, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_no_gradient_crosses_documents_or_time():
    hidden, weight, _, _ = inputs_of([3, 4, 2], 4)
    output, _ = short_convolution(hidden, weight, layout_of([3, 4, 2]))
    (grad,) = torch.autograd.grad(output[4].sum(), hidden)  # second token of the second document
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [3, 4]


def test_a_neighbour_that_is_not_a_number_changes_nothing():
    lengths = [2, 5, 1]
    hidden, weight, _, _ = inputs_of(lengths, 4)
    clean, _ = short_convolution(hidden, weight, layout_of(lengths))
    dirty = hidden.detach().clone()
    dirty[2:7] = float("nan")
    dirty.requires_grad_()
    output, _ = short_convolution(dirty, weight, layout_of(lengths))
    assert torch.equal(output[:2], clean[:2])
    assert torch.equal(output[7:], clean[7:])
    (grad,) = torch.autograd.grad(output[[0, 1, 7]].sum(), dirty)
    assert grad[[0, 1, 7]].isfinite().all()


@pytest.mark.parametrize("first", [[1, 1, 1], [2, 5, 1], [8, 1, 3]])
def test_a_state_carried_over_is_the_whole(first):
    whole = [9, 6, 4]
    hidden, weight, bias, _ = inputs_of(whole, 4)
    options = {"bias_C": bias, "activation": "silu"}
    output, final = short_convolution(hidden, weight, layout_of(whole), **options)
    documents = hidden.split(whole)
    early = torch.cat([item[:n] for item, n in zip(documents, first, strict=True)])
    late = torch.cat([item[n:] for item, n in zip(documents, first, strict=True)])
    head, state = short_convolution(early, weight, layout_of(first), **options)
    rest = [w - n for w, n in zip(whole, first, strict=True)]
    tail, end = short_convolution(late, weight, layout_of(rest), initial_state=state, **options)
    parts = zip(head.split(first), tail.split(rest), strict=True)
    torch.testing.assert_close(torch.cat([part for pair in parts for part in pair]), output, **EXACT)
    assert torch.equal(end, final)


def test_equals_the_convolution_of_transformers_in_bfloat16():
    """Sum in float32, one rounding, then silu: the order of torch's convolution in half precision."""
    hidden, weight, _, _ = (item.detach() for item in inputs_of([30], 4, torch.bfloat16, channels=16))
    output, _ = short_convolution(hidden, weight, layout_of([30]), activation="silu")
    conv = torch.nn.Conv1d(16, 16, 4, groups=16, padding=3, bias=False, dtype=torch.bfloat16)
    conv.weight.data = weight[:, None]
    expected = torch.nn.functional.silu(conv(hidden.t()[None])[..., :30])[0].t()
    # The same numbers; a sum that ends beside a tie may round the other way: one unit of 8 bits, of values up to 10.
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-9)
    assert (output != expected).float().mean() < 0.02


def test_autocast_decides_the_dtype():
    hidden, weight, _, state = inputs_of([3, 2], 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, final = short_convolution(hidden, weight, layout_of([3, 2]), initial_state=state)
    assert output.dtype == final.dtype == torch.bfloat16
    output.float().sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_what_it_refuses():
    bounds, positions = np.array([0, 3, 5], np.int32), np.array([0, 1, 2, 3, 4])
    prefixes = SharedPrefixes.of(bounds, positions, np.array([-1, 0], np.int32)).map(torch.from_numpy)
    layout = DocumentLayout.of(torch.from_numpy(bounds), 3, prefixes=prefixes)
    hidden, weight, _, _ = inputs_of([3, 2], 4)
    with pytest.raises(ConfigError, match="share_prefixes: false"):
        short_convolution(hidden, weight, layout)
    with pytest.raises(ValueError, match="gelu"):
        short_convolution(hidden, weight, layout_of([3, 2]), activation="gelu")
