"""Sharded = single: two processes over gloo compute what one does, with weights laid over them and with tensor
parallelism.

What is checked is how the architecture is cut, which does not depend on its weights; so the gate builds a model with
one layer of each kind and random weights. The weights of a folder can be had as well: reading each rank's share is
then part of the check. Float64 leaves the order of sums over ranks as the only difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.verify_documents import furthest
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.lora import whole
from posttrain_lib.models.scratch import init_weights
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.manifests import Check
from posttrain_lib.schema.mesh import MeshSpec

#: A missing sum over ranks is of order 1; float64 rounding through a few layers 1e-13. Anything between is a finding.
_LIMIT = 1e-9
_LENGTHS = (5, 1, 17, 9)
_RANKS = 2
_VOCABULARY = 64
_SECONDS = 300  # a rank that died leaves its peer waiting


class TwoProcesses:
    """Two processes that stay up for several checks: each takes seconds to import what it needs."""

    def __enter__(self) -> TwoProcesses:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(_RANKS)]
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()

    def run(self, spec: ModelSpec, folder: str | None, kind: str) -> list[_Result]:
        """What each of two ranks computes."""
        port = free_port()
        ranks = [pool.submit(_run, spec, folder, kind, rank, _RANKS, port) for rank, pool in enumerate(self._pools)]
        return [rank.result(timeout=_SECONDS) for rank in ranks]


def check_sharded(
    spec: ModelSpec, *, folder: str | Path | None = None, processes: TwoProcesses | None = None
) -> list[Check]:
    """Logits and the gradient of every parameter, by both ways of sharding; takes some ten seconds.

    A way that cannot cut this architecture (heads that two does not divide) is reported as passed, with the reason.

    Args:
        folder: of the model, which is then loaded whole, each rank its own share. Without it: random weights, one layer
            of each kind.
        processes: that are up already; default: its own.
    """
    source = None if folder is None else str(folder)
    small = one_layer_of_each_kind(spec) if folder is None else spec
    expected = _run(small, source, "single", 0, 1, 0)
    with TwoProcesses() if processes is None else contextlib.nullcontext(processes) as two:
        return [_compared(kind, expected, two.run(small, source, kind)) for kind in ("fsdp", "tensor parallel")]


def one_layer_of_each_kind(spec: ModelSpec) -> ModelSpec:
    """The spec of a decoder that has each of the model's different layers once, and few tokens to know."""
    layers = tuple(dict.fromkeys(spec.config.layers))
    config = dataclasses.replace(spec.config, layers=layers, vocab_size=_VOCABULARY, padded_vocab_size=None)
    return dataclasses.replace(spec, config=config)


@dataclasses.dataclass(frozen=True)
class _Result:
    """Outputs and whole gradients of one rank; or why the architecture cannot be cut so."""

    logits: Tensor | None = None
    grads: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    refused: str = ""


def _run(spec: ModelSpec, folder: str | None, kind: str, rank: int, world: int, port: int) -> _Result:
    from posttrain_lib.parallel.apply import settle_gradients
    from posttrain_lib.parallel.process_group import process_group

    if world > 1:  # a process of its own; the ranks share the machine
        torch.set_num_threads(1)
    with process_group(rank, world, f"127.0.0.1:{port}", torch.device("cpu")):
        try:
            model = _laid(spec, folder, kind, world)
        except ConfigError as refusal:
            return _Result(refused=f"{refusal.what}: {refusal.got}")
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(spec.config.vocab_size, (sum(_LENGTHS),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in _LENGTHS])
        ends = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
        logits = model(token_ids, positions, ends, max(_LENGTHS))
        total = (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).sum()
        # Gradients are summed over ranks with different rows; here these have the same, so each gives its share.
        (total / _mesh(kind, world).data_degree).backward()
        settle_gradients(model)
        grads = {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}
        return _Result(logits.detach(), grads)


def _laid(spec: ModelSpec, folder: str | None, kind: str, world: int) -> Decoder:
    """The model in float64 over the ranks, its weights random or read from the folder into each rank's share."""
    if folder is None:
        model = build_model(spec, dtype=torch.float64)
        init_weights(model, spec, seed=0)
        _lay(model, kind, world)
        return model
    model = build_model(spec, dtype=torch.float64, device="meta")
    _lay(model, kind, world)
    model.to_empty(device="cpu")
    load_hf_weights(model, spec, folder)
    return model


def _lay(model: Decoder, kind: str, world: int) -> None:
    from posttrain_lib.parallel.apply import apply_parallelism
    from posttrain_lib.parallel.mesh import rank_mesh

    mesh = rank_mesh(_mesh(kind, world), torch.device("cpu"))
    apply_parallelism(model, mesh=mesh, activation_checkpointing="full" if kind == "fsdp" else "none")


def _mesh(kind: str, world: int) -> MeshSpec:
    return MeshSpec(tensor=world) if kind == "tensor parallel" else MeshSpec(shard=world)


def _compared(kind: str, expected: _Result, ranks: list[_Result]) -> Check:
    name = f"sharded = single, {kind}"
    if ranks[0].refused:
        return Check(name, True, ranks[0].refused, "two ranks", "this architecture is not cut so over two ranks")
    found: dict[str, float] = {}
    for rank, result in enumerate(ranks):
        pairs = {
            "logits": (result.logits, expected.logits),
            **{n: (g, expected.grads.get(n)) for n, g in result.grads.items()},
        }
        missing = sorted(set(expected.grads) - set(result.grads))
        for part, (got, wanted) in pairs.items():
            apart = float("inf") if got is None or wanted is None or missing else _apart(got, wanted)
            found[f"{missing[0] if missing else part} of rank {rank}"] = apart
    where, worst = furthest(found)
    reason = f"float64, two processes, logits and the gradient of every parameter; largest in {where}"
    return Check(name, worst <= _LIMIT, worst, _LIMIT, reason)


def _apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
