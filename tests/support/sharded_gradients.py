"""Loss and gradients of a tiny model over any mesh, by the training step's own code, in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.checkpoint.hf import load_hf_weights, local_block
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import apply_lora, whole
from posttrain_lib.models.seeds import named_generator
from posttrain_lib.optim.clipping import gradient_norm
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from posttrain_lib.training.train_step import StepSettings, accumulate_gradients
from tests.oracles.tiny_job import pack_rows
from tests.support.lora_cases import everything_of

ROW_TOKENS = 48
#: documents of each row, by their number in the store: as many rows as are dealt out evenly to up to 4 ranks x 2
ROWS = [(0, 1), (2, 3), (4,), (5, 6, 7), (8, 9), (10,), (11, 12), (13, 14)]


@dataclass(frozen=True)
class Work:
    """What to compute. ``store`` is a token store's folder, ``model`` a Hugging Face one."""

    model: str
    store: str
    mesh: MeshSpec = SINGLE
    lora: str = ""  # "", "lora", "dora"
    micro_batches: int = 1
    recompute: Any = "none"
    padded: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Figures of one rank; gradients by name, whole."""

    loss: float
    sources: Tensor
    norm: float
    grads: dict[str, Tensor]


def build(work: Work, dtype: torch.dtype = torch.float64) -> tuple[Decoder, Any]:
    """The model over the ranks, and this rank's mesh."""
    from posttrain_lib.models.vocabulary import with_padded_vocabulary

    spec = with_padded_vocabulary(spec_from_folder(Path(work.model)), work.padded or 1)
    mesh = rank_mesh(work.mesh, torch.device("cpu"))
    model = build_model(spec, dtype, device="meta")
    if work.lora:
        model = apply_lora(model, everything_of(model, dora=work.lora == "dora")).to(dtype)  # adapters are float32
    apply_parallelism(model, mesh=mesh, activation_checkpointing=work.recompute)
    model.to_empty(device="cpu")
    load_hf_weights(model, spec, work.model)
    _fill_adapters(model)
    return model, mesh


def rows_of(store: TokenStore, work: Work, data_rank: int) -> list[PackedBatch]:
    """This rank's micro-batches: rows are dealt out in turn."""
    own = ROWS[data_rank :: work.mesh.data_degree]
    each = -(-len(own) // work.micro_batches)
    return [pack_rows(store, own[start : start + each], ROW_TOKENS) for start in range(0, len(own), each)]


def compute(_rank: int, work: Work) -> Outcome:
    """Loss, sums by source, gradient norm and every gradient on this rank."""
    model, mesh = build(work)
    store, loss = TokenStore(Path(work.store)), SFTLoss()
    batches = rows_of(store, work, mesh.data_rank)
    (divisor,) = mesh.sum_over_rows([sum(loss.divisor(batch) for batch in batches)])
    settings = StepSettings(mesh, "fp32", None, sources=len(store.sources), name_example=str)
    mean, sums = accumulate_gradients(model, loss, batches, settings, global_divisor=divisor)
    norm = float(gradient_norm(model.parameters()))
    return Outcome(mean, sums, norm, gradients(model))


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Every gradient, whole."""
    return {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}


def _fill_adapters(model: Decoder) -> None:
    """Adapters of values that matter, the same for every mesh."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                local, begin = local_block(value)
                filled = torch.randn(value.shape, generator=named_generator(7, name)) * 0.2
                if name.endswith("magnitude"):
                    filled = filled + 1.0
                here = tuple(slice(first, first + size) for first, size in zip(begin, local.shape, strict=True))
                local.copy_(filled[here])


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def collectives(_rank: int, work: Work) -> Counter[str]:
    """How often each collective ran in the forwards and backwards of a step."""
    model, mesh = build(work)
    store = TokenStore(Path(work.store))
    settings = StepSettings(mesh, "fp32", None, sources=len(store.sources), name_example=str)
    with Collectives() as counted:
        accumulate_gradients(model, SFTLoss(), rows_of(store, work, mesh.data_rank), settings, global_divisor=1.0)
    return counted.counts


def shards_of(_rank: int, work: Work) -> dict[str, int]:
    """Numbers of each parameter that this rank holds."""
    model, _ = build(work)
    return {name: local_block(value)[0].numel() for name, value in model.named_parameters()}
