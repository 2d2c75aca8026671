"""longrope: which frequencies a token has is decided by its document's length, alone, packed and in generation."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from posttrain_lib.adapters.hf_reference import load_reference
from posttrain_lib.checkpoint.verify import verify_model
from posttrain_lib.checkpoint.verify_documents import Documents, largest, noise_limit
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.evaluation.generation import greedy_generate
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models import decoder
from posttrain_lib.models.families import spec_from_config, spec_from_folder
from posttrain_lib.models.spec import check_prefixes
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.schema.shared_prefix import SharedPrefixes

CASE = "phi3, longrope"
BOUND = 48  # original_max_position_embeddings of the case
#: on both sides of the bound, at it, and one beyond it
LENGTHS = (20, BOUND, BOUND + 1, 90, 1, 47)


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder(CASE)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def test_documents_of_both_kinds_in_one_row_are_what_transformers_computes_of_each(folder, model):
    documents = Documents.random(spec_from_folder(folder), LENGTHS, 0)
    exact = documents.reference_logits(load_reference(folder, dtype=torch.float64)).double()
    theirs = documents.reference_logits(load_reference(folder, dtype=torch.float32)).double()
    limit = noise_limit(largest(theirs - exact), exact)
    assert largest(documents.packed_logits(model).double() - exact) <= limit


@pytest.mark.parametrize("always", [0, 1])
def test_the_gate_sees_one_set_of_frequencies_for_all(folder, monkeypatch, always):
    right = decoder.by_document

    def wrong(frequencies, bound, positions, cu_seqlens):
        return right(frequencies[[always, always]], bound, positions, cu_seqlens)

    monkeypatch.setattr(decoder, "by_document", wrong)
    report = verify_model(folder)
    assert not report.passed
    assert "logits, float32" in {check.name for check in report.checks if not check.passed}


def _uncached(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def test_generation_across_the_bound_is_that_without_a_cache_and_that_of_transformers(folder, model):
    documents = Documents.random(spec_from_folder(folder), (40, 44, 47, 60, 3), 1)
    prompts = [part.tolist() for part in documents.token_ids.split(documents.lengths)]
    got = greedy_generate(model, prompts, 12, stop_ids=())
    assert got == [_uncached(model, prompt, 12) for prompt in prompts]
    reference = load_reference(folder, dtype=torch.float32)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for prompt, own in zip(prompts, got, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            use_cache=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == own


def test_a_kept_sequence_that_crosses_the_bound_is_refused_until_it_is_forgotten(model):
    ids, lengths = torch.randint(3, 90, (2 * BOUND,)), torch.tensor([0, BOUND, 2 * BOUND], dtype=torch.int32)
    places = torch.arange(BOUND).repeat(2)
    with torch.no_grad():
        cache = KeyValueCache(2, BOUND + 1)
        model(ids, places, lengths, BOUND, cache=cache)
        cache.advance([BOUND, BOUND])
        two, one = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([BOUND, BOUND])
        with pytest.raises(ValueError, match="sequence 0 grows from 48 to 49 tokens"):
            model(ids[:2], one, two, 1, cache=cache)
        cache.forget([0, 1])
        assert cache.lengths.tolist() == [0, 0]
        model(ids, places, lengths, BOUND, cache=cache)


def test_a_beginning_shared_with_a_longer_document_is_refused(model):
    parents, bounds = np.array([-1, 0], np.int32), np.array([0, 30, 60], np.int32)
    for long, said in ((False, None), (True, "share beginnings")):
        first = 25 if long else 10
        positions = np.concatenate([np.arange(30), np.arange(first, first + 30)])
        prefixes = SharedPrefixes.of(bounds, positions, parents).map(torch.as_tensor)
        arguments = torch.randint(3, 90, (60,)), torch.as_tensor(positions), torch.as_tensor(bounds), 30
        with torch.no_grad():
            if said is None:
                model(*arguments, prefixes=prefixes)
                continue
            with pytest.raises(ValueError, match=said):
                model(*arguments, prefixes=prefixes)


def test_shared_beginnings_are_refused_before_a_run_with_documents_beyond_the_bound(folder):
    config = spec_from_folder(folder).config
    check_prefixes(config, True, BOUND)
    check_prefixes(config, False, BOUND + 1)
    with pytest.raises(ConfigError, match="share_prefixes"):
        check_prefixes(config, True, BOUND + 1)


def _config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"] = {**content["rope_parameters"], **changes}
    return content


def test_older_files_say_su_beside_a_field_of_their_own(folder):
    """As Phi-3's first 128k files: ``rope_scaling`` with ``type: su``, the bound and theta outside."""
    content = _config(folder)
    new = content.pop("rope_parameters")
    old = {
        **content,
        "rope_theta": new["rope_theta"],
        "partial_rotary_factor": new["partial_rotary_factor"],
        "rope_scaling": {"type": "su", "short_factor": new["short_factor"], "long_factor": new["long_factor"]},
    }
    assert spec_from_config(old).config == spec_from_folder(folder).config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"short_factor": [1.0, 1.0]}, "short_factor"),
        ({"long_factor": [1.0, -2.0, 1.0]}, r"long_factor\[1\]"),
        ({"long_factor": None}, "long_factor"),
        ({"long_mscale": 1.2}, "long_mscale"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(folder, changes, named):
    with pytest.raises(ModelError, match=named):
        spec_from_config(_config(folder, **changes))
