"""Parameters and stored tensors correspond: any block of a parameter is read from its own regions, and back."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain_lib.checkpoint.hf import fill_from, iter_hf_weights, pieces_by_parameter, stored_tensors
from posttrain_lib.checkpoint.hf_files import StoredTensors, read_headers
from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.weights import Rule, clipped, pieces_of, same, stored_shapes
from tests.support.tiny_models import CASES


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_block_is_the_same_block_of_the_whole(case, family_folder):
    """Of every parameter, blocks as sharding cuts them and others: what a rank reads is what a slice would give."""
    folder, choose = family_folder(case), random.Random(0)
    spec, stored = spec_from_folder(folder), StoredTensors(folder)
    whole = dict(iter_hf_weights(spec, folder))
    for name, pieces in pieces_by_parameter(spec).items():
        shape = whole[name].shape
        for _ in range(3):
            begin = [choose.randrange(size) for size in shape]
            size = [choose.randint(1, extent - first) for extent, first in zip(shape, begin, strict=True)]
            block = torch.full(size, float("nan"))
            fill_from(stored, pieces, block, begin)
            expected = whole[name][tuple(slice(a, a + n) for a, n in zip(begin, size, strict=True))]
            assert torch.equal(block, expected), (name, begin, size)


@pytest.mark.parametrize("case", sorted(CASES))
def test_there_and_back_gives_the_stored_bits(case, family_folder):
    folder = family_folder(case)
    spec, stored = spec_from_folder(folder), StoredTensors(folder)
    back = stored_tensors(spec, dict(iter_hf_weights(spec, folder)), torch.float32)
    assert set(back) == set(stored.entries)
    assert all(torch.equal(back[name], stored.read(name)) for name in back)


def test_only_the_regions_of_a_block_are_asked_for(family_folder, monkeypatch):
    """A rank that holds half of the experts does not touch the other half's tensors."""
    folder = family_folder("qwen3_moe")
    spec = spec_from_folder(folder)
    asked = []
    monkeypatch.setattr(
        StoredTensors, "copy", lambda self, regions: asked.extend((each.tensor, each.index) for each in regions)
    )
    pieces = pieces_by_parameter(spec)["layers.0.mlp.experts.up_proj"]
    fill_from(StoredTensors(folder), pieces, torch.empty(3, 4, 32), (3, 8, 0))
    assert asked == [
        (f"model.layers.0.mlp.experts.{expert}.up_proj.weight", (slice(8, 12, 1), slice(0, 32, 1)))
        for expert in (3, 4, 5)
    ]


def test_a_dtype_is_kept_where_the_family_says_so(family_folder):
    spec = spec_from_folder(family_folder("deepseek_v3"))
    weights = dict(iter_hf_weights(spec, family_folder("deepseek_v3")))
    kinds = {name: tensor.dtype for name, tensor in stored_tensors(spec, weights, torch.bfloat16).items()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert wide == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


def test_rules_say_where_regions_lie():
    rules = (
        Rule(("layers.{n}.a", "layers.{n}.b"), "x.{n}.ab", "rows"),
        Rule(("layers.{n}.g", "layers.{n}.u"), "x.{n}.gu", "alternating"),
        Rule(("layers.{n}.d",), "x.{n}.d", "transposed"),
        same("e", "y"),
    )
    shapes = {"layers.2.a": (2, 3), "layers.2.b": (4, 3), "layers.2.g": (2, 5, 3), "layers.2.u": (2, 5, 3)}
    shapes |= {"layers.2.d": (2, 3, 5), "e": (7,)}
    pieces = pieces_of(rules, shapes)
    assert stored_shapes(pieces) == {"x.2.ab": (6, 3), "x.2.gu": (2, 3, 10), "x.2.d": (2, 5, 3), "y": (7,)}
    second = next(piece for piece in pieces if piece.ours == "layers.2.b")
    assert second.their_index == (slice(2, 6), slice(0, 3))
    assert clipped(second, (0, 0), (4, 3)) is not None
    assert clipped(second, (4, 0), (1, 3)) is None


@pytest.mark.parametrize("rules", [(), (same("e", "x"), same("e", "y"))])
def test_a_parameter_without_one_rule_is_a_mistake_of_the_family(rules):
    with pytest.raises(ModelError, match="exactly one rule"):
        pieces_of(rules, {"e": (1,)})


def test_headers_say_where_bytes_lie(family_folder):
    """Against the safetensors library's own reading."""
    from safetensors import safe_open

    folder = family_folder("llama")
    stored = StoredTensors(folder, read_headers(folder))
    with safe_open(folder / "model.safetensors", framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - no dict
            assert torch.equal(stored.read(name), shard.get_tensor(name))


@pytest.mark.parametrize("at_a_time", [1, 500, 1 << 20])
def test_reading_in_parts_gives_the_whole(family_folder, monkeypatch, at_a_time):
    monkeypatch.setattr("posttrain_lib.checkpoint.hf_files.AT_A_TIME", at_a_time)
    folder = family_folder("gpt_oss")
    spec = spec_from_folder(folder)
    parts = dict(iter_hf_weights(spec, folder))
    monkeypatch.undo()
    whole = dict(iter_hf_weights(spec, folder))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
