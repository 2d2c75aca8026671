"""Linear attention by the gated delta rule, as Qwen3-Next has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from posttrain_lib.models.attention import RopeTables
from posttrain_lib.models.norm import RMSNorm
from posttrain_lib.models.spec import DecoderConfig, GatedDeltaConfig, NormConfig
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.gated_delta import gated_delta_rule
from posttrain_lib.ops.short_convolution import short_convolution


class GatedDeltaNet(nn.Module):
    """Query, key and value go through a short causal convolution, then the delta rule; a gate follows the norm.

    ``in_proj_qkvz`` and ``in_proj_ba`` keep the layout of the stored tensors: key head by key head, each with its
    query, key, the values and the output gates of its value heads; and beta and decay of those.
    """

    def __init__(self, config: DecoderConfig, own: GatedDeltaConfig, layer: int) -> None:
        super().__init__()
        self.own, self.layer = own, layer
        keys, values = own.num_key_heads * own.key_dim, own.num_value_heads * own.value_dim
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * own.num_value_heads, bias=False)
        self.convolution = nn.Parameter(torch.empty(2 * keys + values, 1, own.kernel))
        self.dt_bias = nn.Parameter(torch.empty(own.num_value_heads))
        self.A_log = nn.Parameter(torch.empty(own.num_value_heads))
        self.norm = RMSNorm(own.value_dim, NormConfig(own.norm_eps))
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    @torch.compiler.disable
    def forward(self, hidden_TD: Tensor, tables: RopeTables, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]. It has no use for positions. Not compiled: documents differ from row to row."""
        own = self.own
        each = own.num_value_heads // own.num_key_heads
        by_key_head = self.in_proj_qkvz(hidden_TD).unflatten(-1, (own.num_key_heads, -1))
        sizes = [own.key_dim, own.key_dim, each * own.value_dim, each * own.value_dim]
        query, key, value, gate = by_key_head.split(sizes, dim=-1)
        beta, decay = self.in_proj_ba(hidden_TD).unflatten(-1, (own.num_key_heads, -1)).split(each, dim=-1)
        mixed, ends = short_convolution(
            torch.cat([part.flatten(-2) for part in (query, key, value)], dim=-1),
            self.convolution.squeeze(1),
            layout,
            activation="silu",
            initial_state=self._kept(layout, 0),
        )
        keys = own.num_key_heads * own.key_dim
        query, key, value = mixed.split([keys, keys, own.num_value_heads * own.value_dim], dim=-1)
        query = query.unflatten(-1, (-1, own.key_dim)).repeat_interleave(each, dim=1)
        key = key.unflatten(-1, (-1, own.key_dim)).repeat_interleave(each, dim=1)
        value = value.unflatten(-1, (-1, own.value_dim))
        wide = torch.promote_types(decay.dtype, torch.float32)
        log_decay = -self.A_log.to(wide).exp() * softplus(decay.flatten(-2).to(wide) + self.dt_bias)
        out, state = gated_delta_rule(
            query,
            key,
            value,
            log_decay,
            beta.flatten(-2).sigmoid(),
            layout,
            scale=own.key_dim**-0.5,
            normalise=True,
            initial_state=self._kept(layout, 1),
        )
        if layout.cache is not None:
            layout.cache.set_state(self.layer, (ends, state))
        normed = self.norm(out)
        wide = torch.promote_types(normed.dtype, torch.float32)
        gated = (normed * silu(gate.reshape(normed.shape).to(wide))).to(normed.dtype)
        return self.out_proj(gated.flatten(-2))

    def _kept(self, layout: DocumentLayout, number: int) -> Tensor | None:
        """What the cache keeps of the documents before these tokens; None at their beginning."""
        state = None if layout.cache is None else layout.cache.state(self.layer)
        return None if state is None else state[number]
