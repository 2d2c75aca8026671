"""Memory of one device by kind, from the model's spec and how a run lays it over ranks. No weight is read.

Where ranks differ, of the one that holds most. What cannot be counted is an assumption and a named constant here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain_lib.compute.plan_activations import Recomputation, Setting, block_kept
from posttrain_lib.models.spec import (
    AttentionConfig,
    ExpertsConfig,
    GatedDeltaConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelSpec,
    layer_number,
)
from posttrain_lib.schema.mesh import MeshSpec

_FLOAT32 = 4
#: assumed, per process: CUDA's context with loaded kernels, NCCL's channels, cuBLAS' workspaces
CUDA_RUNTIME_BYTES = int(1.5 * 2**30)
#: assumed, per process: the interpreter, torch and the loader; measured figures of small runs lie near it
CPU_RUNTIME_BYTES = int(0.5 * 2**30)
#: assumed: what an allocator holds beyond what is in use, as a share of it
ALLOCATOR_SLACK = 0.05
#: blocks whose weights FSDP2 holds whole at a time: the one that computes and the next one, fetched ahead
GATHERED_BLOCKS = 2

#: kind of memory -> what it is, in the order of the plan
KINDS = {
    "parameters": "this device's share of the weights",
    "gradients": "this device's share of their gradients",
    "optimiser": "this device's share of the optimiser's state",
    "gradients between micro-batches": "whole ones, kept until the step's last backward reduces them",
    "frozen model": "this device's share of the reference's or teacher's weights, and what is gathered of them",
    "gathered weights": f"{GATHERED_BLOCKS} blocks at a time, and embedding and head throughout",
    "communication": "flat copies of a block on its way, and its whole gradient",
    "activations": "what blocks keep for their backward",
    "cast weights": "half-precision copies that blocks keep for their backward",
    "backward of a block": "what is computed again, and gradients of activations",
    "output head": "rows, chunk of logits, gradient of its weight",
    "checkpoint": "this device's share of weights and optimiser's state, copied to be written",
    "runtime": "device context, libraries, allocator slack (assumed)",
}

#: those of them that ``compute.offload`` moves to the host
_HELD = ("parameters", "gradients", "optimiser")


@dataclass(frozen=True)
class Layout:
    """What memory depends on besides the model.

    ``moments``: tensors of a parameter's size that the optimiser keeps, float32. ``base_bytes``: of an entry of frozen
    weights under adapters. ``cuda``: on a GPU, with fused kernels.
    ``emulated``: see ``plan_activations.Setting``.
    """

    mesh: MeshSpec
    row_tokens: int
    rows_per_step: int
    micro_batch_rows: int
    recomputation: Recomputation = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    moments: int = 2
    lora: Any | None = None
    base_bytes: int = _FLOAT32
    offload: bool = False
    cuda: bool = False
    emulated: bool = False

    @property
    def weight_ranks(self) -> int:
        """Ranks that share one copy's weights besides tensor parallelism."""
        return self.mesh.shard * self.mesh.context

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank."""
        return max(1, self.rows_per_step // (self.mesh.data_degree * self.micro_batch_rows))

    @property
    def tokens(self) -> int:
        """Token slots of one forward of a rank."""
        return self.micro_batch_rows * self.row_tokens // self.mesh.context

    @property
    def product_bytes(self) -> int:
        """Of an entry of matrix products."""
        return 2 if self.precision == "bf16" else _FLOAT32


@dataclass(frozen=True)
class Share:
    """Entries of weights: ``own`` of a rank for good, ``whole`` where they are gathered for computing."""

    own: int = 0
    whole: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.own + other.own, self.whole + other.whole)


_NOTHING = Share()


class Estimate:
    """Memory of one model under many layouts: what layouts have in common is counted once."""

    def __init__(self, spec: ModelSpec, beside: ModelSpec | None = None) -> None:
        """``beside``: a frozen model on the same devices, none of whose activations are kept."""
        self.spec = spec
        self._beside = None if beside is None else Estimate(beside)
        self._weights: dict[str, list[tuple[int | None, str, tuple[int, ...], bool]]] = {}
        self._shares: dict[tuple[object, ...], tuple[dict[int | None, Share], dict[int | None, Share]]] = {}
        self._passes: dict[tuple[Layout, str], dict[str, int]] = {}

    def memory(self, layout: Layout) -> dict[str, int]:
        """Bytes of one device by kind (:data:`KINDS`); kinds that a run does not have are 0."""
        trained, frozen = self._shares_of(layout)
        # Without a GPU the host's memory is the device's: what is offloaded lies in it all the same.
        held = dict.fromkeys(_HELD, 0) if layout.offload and layout.cuda else self._held(layout)
        found = {**held, **_sharding(layout, trained, frozen), **self._computing(layout)}
        found["checkpoint"] = 0 if layout.cuda else self._saved(layout)
        found["frozen model"] = 0 if self._beside is None else self._beside.weights(layout)
        runtime = CUDA_RUNTIME_BYTES if layout.cuda else CPU_RUNTIME_BYTES
        found["runtime"] = runtime + int(ALLOCATOR_SLACK * sum(found.values()))
        return {kind: int(found[kind]) for kind in KINDS}

    def weights(self, layout: Layout) -> int:
        """Bytes of one device for the weights alone, with what is gathered of them for computing."""
        trained, frozen = self._shares_of(replace(layout, lora=None))
        gathered = _sharding(layout, trained, frozen)["gathered weights"]
        return gathered + (0 if layout.offload and layout.cuda else _FLOAT32 * _own(trained))

    def host_bytes(self, layout: Layout) -> int:
        """Bytes of host memory that a rank needs for what it does not keep on its GPU, and for the copy of it that a
        checkpoint is written from; 0 without a GPU."""
        return sum(self._held(layout).values()) + self._saved(layout) if layout.offload and layout.cuda else 0

    def _saved(self, layout: Layout) -> int:
        """Bytes of the host's buffer that a checkpoint is written from: what copies of the model share is dealt out."""
        trained, _ = self._shares_of(layout)
        return _FLOAT32 * _own(trained) * (1 + layout.moments) // layout.mesh.replicate

    def _held(self, layout: Layout) -> dict[str, int]:
        trained, frozen = (_own(shares) for shares in self._shares_of(layout))
        sizes = (_FLOAT32 * trained + layout.base_bytes * frozen, _FLOAT32 * trained)
        return dict(zip(_HELD, (*sizes, _FLOAT32 * trained * layout.moments), strict=True))

    def _computing(self, layout: Layout) -> dict[str, int]:
        """Of forward and backward, which know of the mesh only what cuts a token or a row."""
        mesh = MeshSpec(context=layout.mesh.context, tensor=layout.mesh.tensor)
        same = dataclasses.replace(layout, mesh=mesh, rows_per_step=0, offload=False, lora=None, moments=0)
        key = same, repr(layout.lora)
        if key not in self._passes:
            head = {"output head": _head(self.spec, layout)}
            self._passes[key] = {**_activations(self.spec, layout), **head}
        return self._passes[key]

    def _shares_of(self, layout: Layout) -> tuple[dict[int | None, Share], dict[int | None, Share]]:
        """(trained, frozen) by unit: the number of a block, or None for what is outside."""
        mesh, adapters = layout.mesh, repr(layout.lora)
        key = (adapters, layout.weight_ranks, mesh.tensor, mesh.expert)
        if key not in self._shares:
            if adapters not in self._weights:
                self._weights[adapters] = [
                    (layer_number(name), _cut(self.spec, name), shape, is_trained)
                    for name, shape, is_trained in weights_of(self.spec, layout.lora)
                ]
            trained: dict[int | None, Share] = {}
            frozen: dict[int | None, Share] = {}
            known: dict[tuple[str, tuple[int, ...]], Share] = {}
            for unit, kind, shape, is_trained in self._weights[adapters]:
                if (kind, shape) not in known:
                    known[kind, shape] = _share(kind, shape, mesh)
                into = trained if is_trained else frozen
                into[unit] = into.get(unit, _NOTHING) + known[kind, shape]
            self._shares[key] = trained, frozen
        return self._shares[key]


def memory(spec: ModelSpec, layout: Layout) -> dict[str, int]:
    """Bytes of one device by kind, of a single layout."""
    return Estimate(spec).memory(layout)


def _own(shares: Mapping[int | None, Share]) -> int:
    return sum(share.own for share in shares.values())


def _sharding(
    layout: Layout, trained: Mapping[int | None, Share], frozen: Mapping[int | None, Share]
) -> dict[str, int]:
    """What FSDP2 needs besides each rank's share. ``None`` is the root's unit: embedding, last norm, head."""
    kinds = dict.fromkeys(("gradients between micro-batches", "gathered weights", "communication"), 0)
    ranks = layout.weight_ranks * layout.mesh.replicate
    if ranks == 1:
        return kinds
    whole = sum(share.whole for share in trained.values())
    if layout.micro_batches > 1:
        kinds["gradients between micro-batches"] = whole * _FLOAT32
    blocks = sorted({*trained, *frozen} - {None}, key=lambda block: _weight(block, layout, trained, frozen))
    largest = _weight(blocks[-1], layout, trained, frozen)
    root = _weight(None, layout, trained, frozen)
    if layout.weight_ranks > 1:
        kinds["gathered weights"] = GATHERED_BLOCKS * largest + root
    gradient = max(trained.get(block, _NOTHING).whole for block in (blocks[-1], None)) * _FLOAT32
    kinds["communication"] = max(largest, root) + 2 * gradient
    return kinds


def _weight(
    block: int | None, layout: Layout, trained: Mapping[int | None, Share], frozen: Mapping[int | None, Share]
) -> int:
    """Bytes of a unit's weights when they are whole."""
    each = _FLOAT32
    return trained.get(block, _NOTHING).whole * each + frozen.get(block, _NOTHING).whole * min(layout.base_bytes, each)


def share_of(spec: ModelSpec, name: str, shape: tuple[int, ...], mesh: MeshSpec) -> Share:
    """Entries of a parameter on the rank that has most of it: cut by tensor parallelism and laid over shard x context
    along its first dimension; or dealt out by expert, and laid over what is left along whichever dimension is even."""
    return _share(_cut(spec, name), shape, mesh)


def _share(kind: str, shape: tuple[int, ...], mesh: MeshSpec) -> Share:
    ranks = mesh.shard * mesh.context
    first, rest = shape[0], math.prod(shape[1:])
    if kind == "expert" and mesh.expert > 1:  # see parallel.experts.even_dimension
        whole = first // mesh.expert * rest
        return Share(whole // (ranks // mesh.expert), whole)
    if kind in ("column", "vocabulary"):
        first = -(-first // mesh.tensor)
    elif kind == "row":
        rest = -(-rest // mesh.tensor)
    return Share(-(-first // ranks) * rest, first * rest)


def _cut(spec: ModelSpec, name: str) -> str:
    """How tensor and expert ranks share a parameter; adapters and what ``parallel.tensor`` leaves whole: not at all."""
    number = layer_number(name)
    try:
        kind = spec.sharding_of(name)
    except KeyError:  # an adapter
        return "replicate"
    if number is not None and ".attention." in name:
        own = spec.config.layers[number].attention
        if isinstance(own, GatedDeltaConfig) or (isinstance(own, AttentionConfig) and own.qk_norm == "projection"):
            return "replicate"
    return kind


def weights_of(spec: ModelSpec, lora: Any | None) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """(name, shape, whether it is trained) of every parameter, adapters included."""
    if lora is None:
        return tuple((name, shape, True) for name, shape in spec.parameter_shapes().items())
    from posttrain_lib.models.decoder import build_model
    from posttrain_lib.models.lora import apply_lora

    model = apply_lora(build_model(spec, device="meta"), lora)
    return tuple((name, tuple(value.shape), value.requires_grad) for name, value in model.named_parameters())


def _activations(spec: ModelSpec, layout: Layout) -> dict[str, int]:
    """Of all blocks, as if every row were one document."""
    config, tokens = spec.config, layout.tokens
    setting = Setting(
        product_bytes=layout.product_bytes,
        weight_bytes=layout.base_bytes,
        cuda=layout.cuda,
        trained=layout.lora is None,
        adapter_rank=0 if layout.lora is None else layout.lora.rank,
        tensor=layout.mesh.tensor,
        longest=layout.row_tokens,
        emulated=layout.emulated,
    )
    kept = {layer: block_kept(config, layer, setting) for layer in dict.fromkeys(config.layers)}
    mode = layout.recomputation
    again = max(
        (block.per_token["none"] - block.per_token[mode]) * tokens + block.fixed["none"] - block.fixed[mode]
        for block in kept.values()
    )
    return {
        "activations": int(sum(kept[layer].per_token[mode] for layer in config.layers) * tokens),
        "cast weights": int(sum(kept[layer].fixed[mode] for layer in config.layers)),
        "backward of a block": int(again + max(_gradients(config.hidden_size, layer, layout) for layer in kept)),
    }


def _gradients(hidden: int, layer: LayerConfig, layout: Layout) -> float:
    """Bytes of gradients of activations that are there together: of the stream, and twice the widest; keys and values
    of a whole row where its tokens lie over ranks."""
    own, tokens = layer.attention, layout.tokens
    if isinstance(layer.mlp, MLPConfig):
        widest = layer.mlp.intermediate_size / layout.mesh.tensor
    else:
        assert isinstance(layer.mlp, ExpertsConfig)
        widest = layer.mlp.top_k * max(layer.mlp.intermediate_size, hidden)
    gathered = 0.0
    if layout.mesh.context > 1:
        keys = _key_entries(own) / layout.mesh.tensor
        gathered = 2 * keys * tokens * layout.mesh.context * layout.product_bytes
    return 2 * hidden * tokens * _FLOAT32 + 2 * widest * tokens * layout.product_bytes + gathered


def _key_entries(own: AttentionConfig | LatentAttentionConfig | GatedDeltaConfig) -> float:
    """Of keys and values, per token."""
    if isinstance(own, AttentionConfig):
        return 2.0 * own.num_key_value_heads * own.head_dim
    if isinstance(own, LatentAttentionConfig):
        return own.num_attention_heads * (own.nope_dim + own.rope.dims + own.value_dim)
    return 0.0


def _head(spec: ModelSpec, layout: Layout) -> int:
    """Last norm and output head, as if every token were trained (``ops.head_chunks``)."""
    from posttrain_lib.ops import head_chunks as head

    config, tokens, kind = spec.config, layout.tokens, "cuda" if layout.cuda else "cpu"
    entries = 1 if config.score_head else -(-config.vocabulary_rows // layout.mesh.tensor)
    most = head._CHUNK_BYTES.get(kind, head._CHUNK_BYTES_ELSEWHERE) // (_FLOAT32 * entries)
    rows = min(tokens, max(head._LEAST_ROWS, min(head._CHUNK_ROWS.get(kind, head._CHUNK_ROWS_ELSEWHERE), most)))
    size = config.hidden_size
    stream = tokens * size * (2 * _FLOAT32 + layout.product_bytes + 2 * _FLOAT32)  # norm in, out; rows; two gradients
    logits = rows * entries * layout.product_bytes
    block = min(rows * entries * _FLOAT32, head._BLOCK_BYTES.get(kind, head._BLOCK_BYTES_ELSEWHERE))
    cast = entries * size * layout.product_bytes if layout.cuda and layout.product_bytes < _FLOAT32 else 0
    gradient = entries * size * _FLOAT32 if layout.lora is None else 0
    return stream + logits + (0 if layout.cuda else block) + cast + gradient
