"""The feed-forward half of a block: one, or a mixture of experts with its router."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, MLPConfig
from posttrain_lib.ops.experts import Exchange, ExpertAdapter, mixture
from posttrain_lib.ops.swiglu import GATED


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: DecoderConfig, own: MLPConfig) -> None:
        super().__init__()
        hidden, forward = config.hidden_size, own.intermediate_size
        self.activation = GATED[own.activation]
        self.gate_proj = nn.Linear(hidden, forward, bias=own.bias)
        self.up_proj = nn.Linear(hidden, forward, bias=own.bias)
        self.down_proj = nn.Linear(forward, hidden, bias=own.bias)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(self.activation(self.gate_proj(hidden_TD), self.up_proj(hidden_TD)))


class Router(nn.Module):
    """Which experts a token goes through, and with what weight.

    ``correction_bias`` is moved by the balance of the load in pre-training and by no gradient: it stays as loaded, and
    float32 at least, as transformers keeps it.
    """

    def __init__(self, config: DecoderConfig, own: ExpertsConfig) -> None:
        super().__init__()
        self.own = own
        self.weight = nn.Parameter(torch.empty(own.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(own.num_experts)) if own.router == "softmax_of_top" else None
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        correction = torch.empty(own.num_experts, dtype=wide) if own.router == "sigmoid" else None
        self.correction_bias = None if correction is None else nn.Parameter(correction, requires_grad=False)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids int64 [T, k], weights [T, k]) of [T, D]."""
        own = self.own
        if own.router == "sigmoid":
            return self._by_sigmoid(hidden_TD)
        logits = linear(hidden_TD, self.weight, self.bias)
        if own.router == "softmax_of_top":
            chosen, ids = logits.topk(own.top_k, dim=-1)
            return ids, chosen.softmax(-1, dtype=chosen.dtype)
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, ids = logits.softmax(-1, dtype=wide).topk(own.top_k, dim=-1)
        if own.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights if own.float_weights else weights.to(logits.dtype)

    def _by_sigmoid(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """DeepSeek-V3 (2024), section 2.1.2, with node-limited groups; computed in float32 at least."""
        own = self.own
        assert self.correction_bias is not None
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            scores = linear(hidden_TD.to(wide), self.weight.to(wide)).sigmoid()
        choice = scores.detach() + self.correction_bias
        groups = choice.unflatten(-1, (own.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(own.topk_group, dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        ids = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2).topk(own.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if own.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * own.routed_scale


class Experts(nn.Module):
    """The experts' weights, one behind the other: [E, F, D], [E, F, D], [E, D, F]."""

    def __init__(self, config: DecoderConfig, own: ExpertsConfig) -> None:
        super().__init__()
        count, forward, hidden = own.num_experts, own.intermediate_size, config.hidden_size
        self.activation = GATED[own.activation]
        self.gate_proj = nn.Parameter(torch.empty(count, forward, hidden))
        self.up_proj = nn.Parameter(torch.empty(count, forward, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, forward))
        self.gate_bias = nn.Parameter(torch.empty(count, forward)) if own.bias else None
        self.up_bias = nn.Parameter(torch.empty(count, forward)) if own.bias else None
        self.down_bias = nn.Parameter(torch.empty(count, hidden)) if own.bias else None
        self.exchange: Exchange | None = None  # set where experts lie over ranks

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] -> [T, D]: the weighted sum of each token's experts."""
        return mixture(
            hidden_TD,
            ids_TK,
            weights_TK,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            gate_bias_EF=self.gate_bias,
            up_bias_EF=self.up_bias,
            down_bias_ED=self.down_bias,
            activation=self.activation,
            exchange=self.exchange,
            **self.adapters(),
        )

    def adapters(self) -> dict[str, ExpertAdapter | None]:
        """``mixture``'s arguments for low-rank adapters; none here (see ``models.lora``)."""
        return {}


class MixtureOfExperts(nn.Module):
    """Router, experts and, where there is one, the expert that every token goes through."""

    def __init__(self, config: DecoderConfig, own: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(config, own)
        self.experts = Experts(config, own)
        self.shared = MLP(config, own.shared) if own.shared is not None else None
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if own.shared_gate else None

    @torch.compiler.disable
    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]. Not compiled: how many tokens an expert gets differs from row to row."""
        routed = self.experts(hidden_TD, *self.router(hidden_TD))
        if self.shared is None:
            return routed
        shared = self.shared(hidden_TD)
        if self.shared_gate is not None:
            shared = self.shared_gate(hidden_TD).sigmoid() * shared
        return routed + shared
