"""A row that holds shared beginnings once is the same as every document alone: outputs, loss and gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.collate import to_torch
from posttrain_lib.losses import build_loss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import TREE, documents, row_of, tree_of

MODELS = pytest.mark.parametrize("name", ["llama-3.2", "qwen2", "qwen3"])
# float64 has 1e-16 per operation; three layers and their norms pass on some thousands of them
EXACT = 1e-12


def _load(folder, window=None):
    """In float64; with a window, the first layer keeps the whole document."""
    spec = spec_from_folder(folder)
    if window is not None:
        first, *rest = spec.config.layers
        slid = [dataclasses.replace(own, attention=dataclasses.replace(own.attention, window=window)) for own in rest]
        spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, layers=(first, *slid)))
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, folder)
    return spec, model


def _hidden_and_logprobs(hidden, head):
    return torch.cat([hidden, head.logits(hidden).log_softmax(-1)], dim=-1)


def _gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def _alone(model, token_ids):
    length = len(token_ids)
    ends = torch.tensor([0, length], dtype=torch.int32)
    return model(token_ids, torch.arange(length), ends, length, _hidden_and_logprobs)


def _largest_difference(model, vocab_size, tree, said, seed=0):
    """Of outputs and gradients, relative to the largest entry: the row as ``said``, the documents of ``tree`` alone."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens, positions, parents = row_of(said)
    token_ids = torch.randint(vocab_size, (len(positions),), generator=generator)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(torch.as_tensor)
    longest = int(cu_seqlens.diff().max())
    shared = model(token_ids, positions, cu_seqlens, longest, _hidden_and_logprobs, prefixes=prefixes)
    pull = torch.randn(shared.shape, generator=generator, dtype=shared.dtype)
    (shared * pull).sum().backward()
    together = _gradients(model)

    differences = []
    for document, (_, cut, _) in zip(documents(tree), tree, strict=True):
        own = document[cut:]
        alone = _alone(model, token_ids[document])[cut:]
        differences.append(float((shared[own] - alone).detach().abs().max() / alone.detach().abs().max()))
        (alone * pull[own]).sum().backward()
    for name, expected in _gradients(model).items():
        differences.append(float((together[name] - expected).abs().max() / expected.abs().max()))
    return max(differences)


@MODELS
@pytest.mark.parametrize("window", [None, 5])
def test_a_deep_tree_is_its_documents_alone(name, window, tiny_folder):
    spec, model = _load(tiny_folder(name), window)
    assert _largest_difference(model, spec.config.vocab_size, TREE, TREE) <= EXACT


@MODELS
@settings(max_examples=8, deadline=None)
@given(
    choices=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=7),
    window=st.sampled_from([None, 5]),
    seed=st.integers(0, 9),
)
def test_any_tree_is_its_documents_alone(name, choices, window, seed, tiny_folder):
    spec, model = _load(tiny_folder(name), window)
    tree = tree_of(choices)
    assert _largest_difference(model, spec.config.vocab_size, tree, tree, seed) <= EXACT


@pytest.mark.parametrize(
    ("segment", "wrong"), [(4, (1, 5, 6)), (4, (2, 6, 6)), (9, (2, 9, 2)), (8, (-1, 0, 1)), (3, (2, 5, 2))]
)
def test_a_planted_leak_is_seen(segment, wrong, tiny_folder):
    spec, model = _load(tiny_folder("qwen3"), 9)
    said = [*TREE[:segment], wrong, *TREE[segment + 1 :]]
    assert _largest_difference(model, spec.config.vocab_size, TREE, said) > 1e-3


def _packed(documents_tokens, targets, weights, positions, parents):
    """A batch of segments given as lists."""
    lengths = [len(tokens) for tokens in documents_tokens]
    loss_weights = np.concatenate(weights).astype(np.float32)
    return PackedBatch(
        token_ids=np.concatenate(documents_tokens),
        target_ids=np.concatenate(targets),
        loss_weights=loss_weights,
        positions=np.concatenate(positions),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        supervised_index=np.flatnonzero(loss_weights),
        document_sources=np.zeros(len(lengths), np.int32),
        document_ids=np.arange(len(lengths)),
        max_seqlen=max(lengths),
        real_tokens=sum(lengths),
        parents=None if parents is None else np.asarray(parents, np.int32),
    )


@MODELS
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_loss_of_completions_that_share_a_prompt(name, precision, tiny_folder):
    spec, model = _load(tiny_folder(name))
    random = np.random.default_rng(0)
    prompt = random.integers(0, spec.config.vocab_size, 11)
    completions = [random.integers(0, spec.config.vocab_size, length) for length in (4, 9, 1, 6)]
    # Alone: prompt and completion. Shared: the prompt, and after all but its last token each completion's branch.
    whole = [np.concatenate([prompt, completion]) for completion in completions]
    tails = [document[len(prompt) - 1 :] for document in whole]
    shift = [np.append(tokens[1:], 0) for tokens in tails]
    trained = [np.append(np.ones(len(tail) - 1), 0) for tail in tails]
    plain = _packed(
        whole,
        [np.append(document[1:], 0) for document in whole],
        [np.append(np.zeros(len(prompt) - 1), weights) for weights in trained],
        [np.arange(len(document)) for document in whole],
        None,
    )
    shared = _packed(
        [prompt, *tails],
        [np.append(prompt[1:], 0), *shift],
        [np.zeros(len(prompt)), *trained],
        [np.arange(len(prompt)), *[np.arange(len(prompt) - 1, len(document)) for document in whole]],
        [-1, 0, 0, 0, 0],
    )
    assert shared.num_tokens < plain.num_tokens
    assert shared.weight == plain.weight == 20
    model = model.float() if precision else model
    results = []
    for batch in (plain, shared):
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            output = build_loss("sft")(model, to_torch(batch))
        output.local_sum.backward()
        results.append((output.local_sum.detach().double(), output.values.double(), _gradients(model)))
    (sum_plain, nll_plain, gradients_plain), (sum_shared, nll_shared, gradients_shared) = results
    # bfloat16 keeps 8 bits, and the two ways round other partial sums, in every one of some tens of operations
    limit = EXACT if precision is None else 0.03
    assert abs(float(sum_shared / sum_plain) - 1) <= limit
    assert float((nll_shared - nll_plain).abs().max() / nll_plain.max()) <= limit
    for name_, expected in gradients_plain.items():
        error = (gradients_shared[name_] - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
        # A bias of all keys moves a query's scores alike, but for what rotation makes of it: its gradient is what is
        # left of sums that cancel, and their rounding is no smaller for that (0.033 on one CPU, below 0.03 on others).
        cancels = precision is not None and name_.endswith("k_proj.bias")
        assert float(error) <= (2 * limit if cancels else limit), name_
