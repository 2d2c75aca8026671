"""Tensor parallelism as Megatron-LM has it (Shoeybi et al. 2019): attention by heads, feed-forward by features, the
vocabulary by rows. Applied to a finished model; its forward stays as it is.

Inputs of a layer are whole on every rank. A projection that is cut by columns gives each rank some heads or features,
the one behind it, cut by rows, adds the ranks' shares up. What a rank applies to its own heads alone (a norm per head,
the part of a latent key that all heads share) gets a gradient that is a share of a sum.

Whole on every rank stay: norms over all heads at once (OLMo), mixtures of experts, linear attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from posttrain_lib.errors import ConfigError
from posttrain_lib.models.attention import Attention, LatentAttention
from posttrain_lib.models.blocks import DecoderBlock
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.feed_forward import MLP
from posttrain_lib.ops.output_head import VocabularyShard

_CUT_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Lay the model over the ranks of a mesh of one dimension, in place; before its weights are loaded.

    Raises:
        ConfigError: heads, features or the vocabulary cannot be cut into so many parts.
    """
    degree = mesh.size()
    _check(model, degree)
    for layer in _blocks(model):
        if isinstance(layer.attention, LatentAttention):
            _cut_projections(layer.attention, mesh)
            layer.attention.shared_key.register_forward_hook(lambda _module, _args, result: _to_own_heads(result, mesh))
        elif _is_cut(layer.attention):
            _cut_projections(layer.attention, mesh)
            _share_between_heads(layer.attention, mesh)
        if (feed_forward := _feed_forward(layer)) is not None:
            _cut_projections(feed_forward, mesh)
    parallelize_module(model.embed_tokens, mesh, RowwiseParallel(input_layouts=Replicate()))
    if model.lm_head is not None:
        _lay(model.lm_head, "weight", mesh, Shard(0))
    rows = model.head_weight.shape[0]
    model.vocabulary_shard = VocabularyShard(mesh.get_group(), mesh.get_local_rank() * (rows // degree))
    return model


def _blocks(model: Decoder) -> Iterator[DecoderBlock]:
    for layer in model.layers:
        assert isinstance(layer, DecoderBlock)
        yield layer


def _is_cut(attention: nn.Module) -> TypeGuard[Attention]:
    return isinstance(attention, Attention) and attention.own.qk_norm != "projection"


def _feed_forward(layer: DecoderBlock) -> MLP | None:
    """The one that every token goes through, if there is one."""
    return layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.shared


def _cut_projections(module: nn.Module, mesh: DeviceMesh) -> None:
    names = {name for name, _ in module.named_children()}
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in _CUT_BY_COLUMNS if name in names}
    plan |= {name: RowwiseParallel() for name in ("o_proj", "down_proj") if name in names}
    parallelize_module(module, mesh, plan)


def _share_between_heads(attention: Attention, mesh: DeviceMesh) -> None:
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            _lay(norm, "weight", mesh, Replicate())
            norm.is_shared = True
    if attention.sinks is not None:
        _lay(attention, "sinks", mesh, Shard(0))


def _to_own_heads(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """As it is; the gradients that the ranks' heads give it are added up."""
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _lay(module: nn.Module, name: str, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    parameter = getattr(module, name)
    laid = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(laid, requires_grad=parameter.requires_grad))


def _check(model: Decoder, degree: int) -> None:
    def refuse(what: str, number: int, where: str) -> None:
        if number % degree:
            raise ConfigError(
                f"tensor parallelism cannot cut {what} into equal parts",
                where=where,
                got=f"{number} over {degree} ranks",
                expected=f"a degree that divides {number}",
            )

    for number, layer in enumerate(_blocks(model)):
        where = f"layer {number}"
        if isinstance(layer.attention, LatentAttention):
            refuse("the heads", layer.attention.own.num_attention_heads, where)
        elif _is_cut(layer.attention):
            refuse("the key heads", layer.attention.own.num_key_value_heads, where)
        if (feed_forward := _feed_forward(layer)) is not None:
            refuse("the feed-forward", feed_forward.up_proj.out_features, where)
    refuse("the vocabulary", model.head_weight.shape[0], "model.vocabulary.pad_to_multiple_of")
