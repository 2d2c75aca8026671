"""The products of a decoder, walked in the order in which its modules run them.

Every matrix product appears once, with its FLOPs and what its backward needs of it: nothing where no gradient flows.
Shapes are read off the modules, and whether a weight is trained off the parameter, so that a family, an adapter or a
frozen part needs no formula here. Only what a kind of module multiplies is said below.

Not products, and left out: lookups, norms, rotary embeddings, activations, softmax, biases, sums, moving rows to their
experts. Left out too, since they cost the same whatever the tokens: the lengths of DoRA's rows, a product of weights
alone once a forward. Counted though no matrix product: the short convolution and the delta rule's recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from posttrain_lib.models.attention import Attention, LatentAttention
from posttrain_lib.models.blocks import DecoderBlock
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.feed_forward import MLP, Experts, MixtureOfExperts
from posttrain_lib.models.linear_attention import GatedDeltaNet
from posttrain_lib.models.lora import LoraEmbedding, LoraExperts, LoraLinear

#: what a product is done for: each useful token, each supervised position, each document, each query-key pair
Per = Literal["token", "supervised", "document", "pair"]


@dataclass(frozen=True)
class Product:
    """FLOPs of one product for one ``per``.

    ``backward``: into its inputs and its trained weights, as far as a gradient is needed there.
    ``again``: of its forward, in the backward, whatever the recomputation of blocks.
    ``window``: of the pairs; None = all before a token. ``block``: the layer that it belongs to, None for the rest.
    ``inner``: over how many numbers it sums, 0 where its result has no operator's name to be kept under.
    ``kind``: "linear" for a projection of its own, "grouped" for all experts' at once, "attention", "recurrence".
    """

    per: Per
    forward: float
    backward: float
    again: float = 0.0
    window: int | None = None
    block: int | None = None
    inner: int = 0
    kind: Literal["linear", "grouped", "attention", "recurrence"] = "linear"


@dataclass(frozen=True)
class BlockEnd:
    """What decides how far a recomputed block runs. ``flows``: whether its output has a gradient at all; without one
    nothing is kept and nothing runs again. ``saved``: whether something behind its last product keeps that product's
    result: the rerun stops at the last tensor that the backward asks for."""

    flows: bool
    saved: bool


def products_of(model: Decoder) -> tuple[list[Product], list[BlockEnd]]:
    """All products of a decoder that is not sharded (the meta device is enough), and how each block ends."""
    walk = _Walk()
    flows = walk.embedding(model.embed_tokens)
    ends = []
    for number, block in enumerate(model.layers):
        assert isinstance(block, DecoderBlock)
        first = len(walk.products)
        flows = walk.block(block, flows)
        walk.products[first:] = [replace(product, block=number) for product in walk.products[first:]]
        ends.append(BlockEnd(flows, _keeps_last(block)))
    walk.head(model, flows or _trains(model.norm))
    return walk.products, ends


def _trains(*parts: nn.Module | Tensor | None) -> bool:
    """Whether any parameter of these is trained."""
    return any(parameter.requires_grad for part in parts for parameter in _parameters(part))


def _parameters(part: nn.Module | Tensor | None) -> Iterator[Tensor]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
    elif part is not None:
        yield part


def _keeps_last(block: DecoderBlock) -> bool:
    """A norm keeps its input, and so does a trained factor: of a gate, or DoRA's."""
    if block.post_mlp_norm is not None:
        return True
    mlp = block.mlp
    if isinstance(mlp, MixtureOfExperts):
        if mlp.shared is None or mlp.shared_gate is not None:
            return True
        mlp = mlp.shared
    return getattr(mlp.down_proj, "lora_magnitude", None) is not None


class _Walk:
    """Appends products; each method returns whether its result has a gradient, given whether its input has one."""

    def __init__(self) -> None:
        self.products: list[Product] = []

    def embedding(self, module: nn.Embedding) -> bool:
        if isinstance(module, LoraEmbedding):  # rows of "down" are looked up, "up" is a product
            self._product(module.lora_up, _trains(module.lora_down))
        return _trains(module)

    def block(self, block: DecoderBlock, stream: bool) -> bool:
        mixed = self.mixer(block.attention, stream or _trains(block.pre_attention_norm))
        stream = stream or mixed or _trains(block.post_attention_norm)
        inside = stream or _trains(block.pre_mlp_norm)
        added = self.mlp(block.mlp, inside) if isinstance(block.mlp, MLP) else self.mixture(block.mlp, inside)
        return stream or added or _trains(block.post_mlp_norm)

    def mixer(self, module: Attention | LatentAttention | GatedDeltaNet, flows: bool) -> bool:
        if isinstance(module, Attention):
            return self.attention(module, flows)
        return self.latent(module, flows) if isinstance(module, LatentAttention) else self.delta(module, flows)

    def attention(self, module: Attention, flows: bool) -> bool:
        own = module.own
        query = self.linear(module.q_proj, flows) or _trains(module.q_norm)
        key = self.linear(module.k_proj, flows) or _trains(module.k_norm)
        value = self.linear(module.v_proj, flows)
        heads, size = own.num_attention_heads, own.head_dim
        mixed = self._pairs(own.window, heads, size, size, query, key, value, _trains(module.sinks))
        return self.linear(module.o_proj, mixed)

    def latent(self, module: LatentAttention, flows: bool) -> bool:
        own = module.own
        if own.q_rank is None:
            query = self.linear(module.q_proj, flows)
        else:
            query = self.linear(module.q_b_proj, self.linear(module.q_a_proj, flows) or _trains(module.q_a_norm))
        shared = self.linear(module.kv_a_proj, flows)
        value = self.linear(module.kv_b_proj, shared or _trains(module.kv_a_norm))
        width = own.nope_dim + own.rope.dims
        heads = own.num_attention_heads
        mixed = self._pairs(own.window, heads, width, own.value_dim, query, shared or value, value, False)
        return self.linear(module.o_proj, mixed)

    def delta(self, module: GatedDeltaNet, flows: bool) -> bool:
        """The rule reads its memory twice and writes it once per token, 2 FLOPs an entry each: its recurrence. That
        chunks compute more to run faster is not counted. Each tap of the convolution is 2."""
        own = module.own
        mixed, gates = self.linear(module.in_proj_qkvz, flows), self.linear(module.in_proj_ba, flows)
        taps = 2.0 * module.convolution.numel()
        trained = _trains(module.convolution)
        self.products.append(Product("token", taps, taps * (mixed + trained), kind="recurrence"))
        inside = mixed or gates or trained or _trains(module.A_log, module.dt_bias)
        memory = 6.0 * own.num_value_heads * own.key_dim * own.value_dim
        self.products.append(Product("token", memory, 2 * memory * inside, kind="recurrence"))
        return self.linear(module.out_proj, inside or _trains(module.norm))

    def mlp(self, module: MLP, flows: bool) -> bool:
        gate, up = self.linear(module.gate_proj, flows), self.linear(module.up_proj, flows)
        return self.linear(module.down_proj, gate or up)

    def mixture(self, module: MixtureOfExperts, flows: bool) -> bool:
        chosen = self._product(module.router.weight, flows) or _trains(module.router)
        added = self.experts(module.experts, module.router.own.top_k, flows)
        if module.shared is not None:
            added = self.mlp(module.shared, flows) or added
        if module.shared_gate is not None:
            added = self.linear(module.shared_gate, flows) or added
        return chosen or added

    def experts(self, module: Experts, top_k: int, flows: bool) -> bool:
        """Of each projection the ``top_k`` experts' that a token goes through."""

        def project(name: str, flows: bool) -> bool:
            weight, bias = getattr(module, f"{name}_proj"), getattr(module, f"{name}_bias")
            self._product(weight[0], flows, _trains(weight), times=top_k)
            adapted = isinstance(module, LoraExperts) and f"{name}_proj" in module.lora_scales
            if not adapted:
                return flows or _trains(weight, bias)
            down, up = (getattr(module, f"{name}_proj_lora_{kind}") for kind in ("down", "up"))
            self._product(down[0], flows, _trains(down), times=top_k)
            self._product(up[0], flows or _trains(down), _trains(up), times=top_k)
            return flows or _trains(weight, bias, down, up)

        gate, up = project("gate", flows), project("up", flows)
        return project("down", gate or up)

    def linear(self, module: nn.Linear, flows: bool) -> bool:
        self._product(module.weight, flows)
        if isinstance(module, LoraLinear):
            self._product(module.lora_down, flows)
            self._product(module.lora_up, flows or _trains(module.lora_down))
        return flows or _trains(module)

    def head(self, model: Decoder, flows: bool) -> None:
        """Rows of padding in the vocabulary do no work that anybody asked for. A score is asked for once a document."""
        entries, hidden = model.config.head_entries, model.config.hidden_size
        per: Per = "document" if model.config.score_head else "supervised"
        self._product(model.head_weight[:entries], flows, _trains(model.head_weight), per=per)
        adapter = model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        if not isinstance(adapter, LoraLinear | LoraEmbedding):
            return
        rank = min(adapter.lora_down.shape)
        with torch.device("meta"):
            down, up = torch.empty(rank, hidden), torch.empty(entries, rank)
        trained = _trains(adapter.lora_down, adapter.lora_up)
        # the low rows are formed again for the gradient of "up": they are not kept
        again = 2.0 * down.numel() * trained
        self._product(down, flows, trained, per="supervised", again=again)
        self._product(up, flows or trained, trained, per="supervised")

    def _product(
        self,
        weight_OI: Tensor,
        flows: bool,
        trained: bool | None = None,
        *,
        per: Per = "token",
        times: int = 0,
        again: float = 0.0,
    ) -> bool:
        """``times``: of experts, those that a token goes through; 0 for a product that stands alone."""
        trained = _trains(weight_OI) if trained is None else trained
        flops = 2.0 * weight_OI.numel() * max(1, times)
        kind: Literal["linear", "grouped"] = "grouped" if times else "linear"
        self.products.append(
            Product(per, flops, flops * (flows + trained), again, inner=weight_OI.shape[-1], kind=kind)
        )
        return flows or trained

    def _pairs(
        self,
        window: int | None,
        heads: int,
        width: int,
        value_width: int,
        query: bool,
        key: bool,
        value: bool,
        sinks: bool,
    ) -> bool:
        """Scores and the mixing of values. The scores' gradient is a product of its own."""
        scores, mixing = 2.0 * heads * width, 2.0 * heads * value_width
        scored = query or key
        backward = scores * (query + key) + mixing * (value + (scored or sinks))
        self.products.append(Product("pair", scores + mixing, backward, window=window, kind="attention"))
        return scored or value or sinks
