"""The decoder: packed tokens in, whatever the output makes of the last hidden states out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain_lib.errors import ModelError
from posttrain_lib.models.blocks import DecoderBlock, RMSNorm
from posttrain_lib.models.heads import Output, full_logits
from posttrain_lib.models.spec import DecoderConfig, ModelSpec
from posttrain_lib.ops.attention import DocumentLayout, attention_dtype, has_fused_varlen
from posttrain_lib.ops.rope import inverse_frequencies, rope_tables

if TYPE_CHECKING:
    from posttrain_lib.schema.shared_prefix import SharedPrefixes


class Decoder(nn.Module):
    """A causal decoder over one packed axis.

    ``layers`` is a ModuleList of blocks: the units that sharding and recomputation wrap. With tied embeddings
    ``lm_head`` is None and the head uses ``embed_tokens.weight``: no second parameter exists.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # No buffer: a cast to bf16 would round it and a meta-device build would lose it. It is H/2 numbers.
        with torch.device("cpu"):
            self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the output head; the embedding's where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cosine, sine) float32 [T, 1, H/2] for int64 positions [T]."""
        return rope_tables(positions, self._frequencies.to(positions.device))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output: Output = full_logits,
        *,
        prefixes: SharedPrefixes | None = None,
    ) -> Any:
        """Run the decoder and hand the normed hidden states to ``output``.

        Args:
            token_ids: int64 [T]. positions: int64 [T], places in the document.
            cu_seqlens: int32 [n+1] boundaries of the segments. max_seqlen: longest segment, tokens.
            output: called as ``output(hidden_TD, head_weight_VD)`` *inside* this forward, while sharded weights are
                whole; a loss closes over its targets. Default: logits [T, V].
            prefixes: where segments find the beginning of their documents, arrays on the model's device; None: every
                segment is a whole document.

        Returns:
            what ``output`` returns.
        """
        hidden = self.embed_tokens(token_ids)
        fused = has_fused_varlen(hidden.device, attention_dtype(hidden))
        layout = DocumentLayout.of(cu_seqlens, max_seqlen, fused=fused, prefixes=prefixes)
        cosine, sine = self.rope_tables(positions)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine, layout)
        return output(self.norm(hidden), self.head_weight)


def build_model(spec: ModelSpec, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a spec, on a device; ``"meta"`` allocates nothing.

    Weights are NaN until they are loaded (``checkpoint.hf.load_hf_weights``) or initialised
    (``models.scratch.init_weights``), so that a forgotten parameter shows in the first loss.

    Raises:
        ModelError: the definition and the spec disagree on parameters (a mistake in a family file).
    """
    with torch.device("meta"):
        model = Decoder(spec.config).to(dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != spec.parameter_shapes():
        differing = sorted(set(shapes.items()) ^ set(spec.parameter_shapes().items()))
        raise ModelError("the decoder's parameters are not those of its spec", where=spec.family, got=differing[:4])
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model
