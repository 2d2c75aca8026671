"""The decoder's block. Module names are the same for every family; what exists and its shapes come from the spec."""

from __future__ import annotations

from torch import Tensor, nn

from posttrain_lib.models.attention import Attention, LatentAttention, RopeTables
from posttrain_lib.models.feed_forward import MLP, MixtureOfExperts
from posttrain_lib.models.linear_attention import GatedDeltaNet
from posttrain_lib.models.norm import RMSNorm
from posttrain_lib.models.spec import (
    AttentionConfig,
    DecoderConfig,
    LatentAttentionConfig,
    Mixer,
    MLPConfig,
    NormPlace,
)
from posttrain_lib.ops.attention import DocumentLayout


def build_attention(config: DecoderConfig, own: Mixer, layer: int) -> Attention | LatentAttention | GatedDeltaNet:
    """The module that mixes tokens, of whatever kind."""
    if isinstance(own, AttentionConfig):
        return Attention(config, own, layer)
    if isinstance(own, LatentAttentionConfig):
        return LatentAttention(config, own, layer)
    return GatedDeltaNet(config, own, layer)


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each added to the stream, with norms before or after or both. The unit of sharding
    and recomputation."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        own = config.layers[layer]

        def norm(place: NormPlace) -> RMSNorm | None:
            return RMSNorm(config.hidden_size, config.norm) if place in own.norms else None

        self.residual_scale = own.residual_scale
        self.pre_attention_norm = norm("pre_attention")
        self.attention = build_attention(config, own.attention, layer)
        self.post_attention_norm = norm("post_attention")
        self.pre_mlp_norm = norm("pre_mlp")
        self.mlp = MLP(config, own.mlp) if isinstance(own.mlp, MLPConfig) else MixtureOfExperts(config, own.mlp)
        self.post_mlp_norm = norm("post_mlp")

    def forward(self, hidden_TD: Tensor, tables: RopeTables, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        added = self.attention(_through(self.pre_attention_norm, hidden_TD), tables, layout)
        hidden_TD = self._plus(hidden_TD, _through(self.post_attention_norm, added))
        added = self.mlp(_through(self.pre_mlp_norm, hidden_TD))
        return self._plus(hidden_TD, _through(self.post_mlp_norm, added))

    def _plus(self, stream: Tensor, added: Tensor) -> Tensor:
        return stream + (added if self.residual_scale == 1.0 else added * self.residual_scale)


def _through(norm: RMSNorm | None, hidden: Tensor) -> Tensor:
    return hidden if norm is None else norm(hidden)
