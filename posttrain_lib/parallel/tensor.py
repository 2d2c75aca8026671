"""Tensor parallelism as Megatron-LM has it (Shoeybi et al. 2019): attention by heads, feed-forward by features, the
vocabulary by rows. Applied to a finished model; its forward stays as it is.

Inputs of a layer are whole on every rank. A projection that is cut by columns gives each rank some heads or features,
the one behind it, cut by rows, adds the ranks' shares up. What a rank applies to its own heads alone (a norm per head,
the part of a latent key that all heads share) gets a gradient that is a share of a sum.

An adapter is cut as its weight's cut requires: by columns the rows of its up, by rows the columns of its down, and the
other half is whole. Its own products need no exchange that the weight's does not.

Whole on every rank stay: norms over all heads at once (OLMo), mixtures of experts, linear attention, a score head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.functional import embedding

from posttrain_lib.errors import ConfigError
from posttrain_lib.models.attention import Attention, LatentAttention
from posttrain_lib.models.blocks import DecoderBlock
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.feed_forward import MLP
from posttrain_lib.models.lora import LoraEmbedding
from posttrain_lib.models.spec import AttentionConfig, DecoderConfig, ExpertsConfig, LatentAttentionConfig
from posttrain_lib.ops.local import local
from posttrain_lib.ops.output_head import VocabularyShard

_CUT_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_CUT_BY_ROWS = ("o_proj", "down_proj")
#: how the parameters of a projection lie over the ranks; those not named are whole
_COLUMNS = dict.fromkeys(("weight", "bias", "lora_up", "lora_magnitude"), Shard(0))
_ROWS = dict.fromkeys(("weight", "lora_down"), Shard(1))
#: of the embedding: tokens are rows of its weight and columns of its adapter's down
_TOKENS = {"weight": Shard(0), "lora_down": Shard(1)}


#: largest degree that is offered
_MOST = 64


def check_tensor(config: DecoderConfig, degree: int) -> None:
    """Refuse what cannot be cut over ``degree`` ranks; knows no process group, for plans and the start of a run.

    Raises:
        ConfigError: heads, features or the vocabulary cannot be cut into so many equal parts.
    """

    def refuse(what: str, number: int, where: str) -> None:
        if number % degree:
            fitting = [str(part) for part in range(2, number + 1) if number % part == 0 and part <= _MOST]
            raise ConfigError(
                f"tensor parallelism cannot cut {what} into equal parts",
                where=f"compute.mesh.tensor, {where}",
                got=f"{number} over {degree} ranks",
                expected=f"one of {', '.join(fitting)}" if len(fitting) > 1 else "".join(fitting) or 1,
            )

    for number, layer in enumerate(config.layers):
        where, own = f"layer {number}", layer.attention
        if isinstance(own, LatentAttentionConfig):
            refuse("the heads", own.num_attention_heads, where)
        elif isinstance(own, AttentionConfig) and own.qk_norm != "projection":
            refuse("the key heads", own.num_key_value_heads, where)
        forward = layer.mlp.shared if isinstance(layer.mlp, ExpertsConfig) else layer.mlp
        if forward is not None:
            refuse("the feed-forward", forward.intermediate_size, where)
    refuse("the vocabulary", config.vocabulary_rows, "model.vocabulary.pad_to_multiple_of")


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Lay the model over the ranks of a mesh of one dimension, in place; before its weights are loaded.

    Raises:
        ConfigError: heads, features or the vocabulary cannot be cut into so many parts.
    """
    degree = mesh.size()
    check_tensor(model.config, degree)
    for layer in _blocks(model):
        if isinstance(layer.attention, LatentAttention):
            _cut_projections(layer.attention, mesh)
            layer.attention.shared_key.register_forward_hook(lambda _module, _args, result: _to_own_heads(result, mesh))
        elif _is_cut(layer.attention):
            _cut_projections(layer.attention, mesh)
            _share_between_heads(layer.attention, mesh)
        if (feed_forward := _feed_forward(layer)) is not None:
            _cut_projections(feed_forward, mesh)
    _lay_all(model.embed_tokens, mesh, _TOKENS)
    model.embed_tokens.forward = partial(_embed, model.embed_tokens, mesh)  # type: ignore[method-assign]
    if model.lm_head is not None:
        _lay_all(model.lm_head, mesh, _COLUMNS)
    if not model.config.score_head:  # whose one row is whole on every rank, as a norm's weight is
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
    for name, projection in module.named_children():
        if name in _CUT_BY_COLUMNS:
            _cut(projection, mesh, _COLUMNS, Replicate(), Shard(-1))
        elif name in _CUT_BY_ROWS:
            _cut(projection, mesh, _ROWS, Shard(-1), Replicate())


def _cut(
    module: nn.Module,
    mesh: DeviceMesh,
    places: Mapping[str, Shard],
    given: Shard | Replicate,
    returned: Shard | Replicate,
) -> None:
    """Lay a module's parameters over the ranks; plain tensors, laid as said, go in and come out."""

    def enter(_module: nn.Module, inputs: Any, _mesh: DeviceMesh) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(value, mesh, [given], run_check=False) for value in inputs)

    def leave(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Tensor:
        whole: Tensor = output.redistribute(mesh, [returned]).to_local()
        return whole

    _lay_all(module, mesh, places)
    # torch annotates the hooks as if they returned nothing; what they return takes the place of input and output.
    distribute_module(module, mesh, None, enter, leave)  # type: ignore[arg-type]


def _lay_all(module: nn.Module, mesh: DeviceMesh, places: Mapping[str, Shard]) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        _lay(module, name, mesh, places.get(name, Replicate()))


def _embed(module: nn.Embedding, mesh: DeviceMesh, token_ids: Tensor) -> Tensor:
    """The embedding's forward where each rank has some tokens' rows: the others' are zero, and the ranks' are summed.

    Not through DTensor: it forgets which tokens were another rank's before an adapter's backward asks for it.
    """
    rows = module.weight.shape[0] // mesh.size()
    own = token_ids - mesh.get_local_rank() * rows
    foreign = (own < 0) | (own >= rows)
    own = own.masked_fill(foreign, 0)

    def look_up(table: Tensor) -> Tensor:
        return _Sum.apply(embedding(own, table).masked_fill(foreign[:, None], 0), mesh.get_group())

    output = look_up(local(module.weight))
    if not isinstance(module, LoraEmbedding):
        return output
    return module.with_adapter(output, look_up(local(module.lora_down).t()))


class _Sum(torch.autograd.Function):
    """What ranks have parts of becomes whole on each; so is the gradient of the whole, and it is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sum over the group."""
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient itself."""
        return grad, None


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
