"""Rollout engines and requests for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.engine.stop_strings import Decode
from posttrain_lib.rl.roles import RolloutRole, Weights
from posttrain_lib.rl.sync_guard import digest_of
from posttrain_lib.schema.rollouts import AllowedTokens, Completion, Request, Sampling


def loaded(folder: Path, dtype: torch.dtype = torch.float64, pad_to: int = 1) -> tuple[Decoder, ModelSpec]:
    """A folder's model, by default in float64: a draw on the border of two tokens is then out of reach."""
    spec = with_padded_vocabulary(spec_from_folder(folder), pad_to)
    model = build_model(spec, dtype=dtype)
    load_hf_weights(model, spec, folder)
    return model, spec


def embedded(
    folder: Path,
    dtype: torch.dtype = torch.float64,
    *,
    window: int = 128,
    slots: int = 4,
    pad_to: int = 1,
    **options: Any,
) -> EmbeddedEngine:
    """An embedded engine over a folder's weights."""
    return EmbeddedEngine(*loaded(folder, dtype, pad_to), window=window, slots=slots, **options)


def request(
    key: str,
    prompt: Sequence[int],
    new_tokens: int = 8,
    *,
    seed: int = 0,
    allowed: AllowedTokens | None = None,
    **sampling: Any,
) -> Request:
    """A request; ``sampling`` as ``schema.rollouts.Sampling`` beside its number of tokens."""
    return Request(key, tuple(prompt), Sampling(new_tokens, **sampling), seed, allowed)


def drained(engine: RolloutRole, requests: Sequence[Request] = ()) -> dict[str, Completion]:
    """Submit, and step until nothing is left: completions by key."""
    engine.submit(requests)
    found: dict[str, Completion] = {}
    while engine.unfinished:
        for completion in engine.step():
            assert completion.key not in found
            found[completion.key] = completion
    return found


class _Forgetful(EmbeddedEngine):
    """Takes the first weights that it is given, and from then on says that it has."""

    def push(self, weights: Weights, version: int) -> str:
        if self.version < 0:
            return super().push(weights, version)
        self.version = version
        return digest_of(weights)


class _Lying(EmbeddedEngine):
    """Says of every sampled token that it was less likely than it was."""

    def step(self) -> list[Completion]:
        return [dataclasses.replace(done, logprobs=done.logprobs - 1.0) for done in super().step()]


def forgetful_engine(folder: str, *, window: int, decode: Decode, device: torch.device) -> EmbeddedEngine:
    """An engine whose weights get old."""
    model, spec = loaded(Path(folder), torch.float32)
    return _Forgetful(model, spec, window=window, slots=8, decode=decode, version=-1)


def lying_engine(folder: str, *, window: int, decode: Decode, device: torch.device) -> EmbeddedEngine:
    """An engine whose log-probabilities are not those of its samples."""
    model, spec = loaded(Path(folder), torch.float32)
    return _Lying(model, spec, window=window, slots=8, decode=decode)
