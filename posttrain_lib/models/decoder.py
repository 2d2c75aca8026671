"""The decoder: packed tokens in, whatever the output makes of the last hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain_lib.models.attention import RopeTables
from posttrain_lib.models.blocks import DecoderBlock
from posttrain_lib.models.heads import Output, full_logits
from posttrain_lib.models.norm import RMSNorm
from posttrain_lib.models.spec import DecoderConfig, ModelSpec
from posttrain_lib.ops.attention import DocumentLayout, attention_dtype, has_fused_varlen
from posttrain_lib.ops.local import local
from posttrain_lib.ops.output_head import OutputHead, VocabularyShard
from posttrain_lib.ops.rope import by_document, inverse_frequencies, rope_tables

if TYPE_CHECKING:
    from posttrain_lib.ops.cache import KeyValueCache
    from posttrain_lib.schema.shared_prefix import SharedPrefixes


class Decoder(nn.Module):
    """A causal decoder over one packed axis.

    ``layers`` is a ModuleList of blocks: the units that sharding and recomputation wrap. With tied embeddings
    ``lm_head`` is None and the head uses ``embed_tokens.weight``: no second parameter exists. With a score head it is
    None too, and ``score`` is the head.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary_rows, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm)
        has_lm_head = not (config.tie_word_embeddings or config.score_head)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary_rows, bias=False) if has_lm_head else None
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if config.score_head else None
        self.vocabulary_shard: VocabularyShard | None = None  # set where rows of the vocabulary's head lie over ranks
        # No buffers: a cast to bf16 would round them and a meta-device build would lose them. They are H/2 numbers.
        with torch.device("cpu"):
            self._frequencies = [inverse_frequencies(rope) for rope in config.ropes]

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the output head; the embedding's where they are tied; [1, D] of a score head."""
        own = self.lm_head if self.score is None else self.score
        return self.embed_tokens.weight if own is None else own.weight

    @property
    def output_head(self) -> OutputHead:
        """The head as losses and samplers use it."""
        config = self.config
        return OutputHead(
            local(self.head_weight),
            vocab_size=config.head_entries,
            scale=config.logit_scale,
            softcap=config.logit_softcap,
            shard=self.vocabulary_shard,
        )

    def rope_tables(self, positions: Tensor, cu_seqlens: Tensor) -> RopeTables:
        """(cosine, sine) float32 [T, 1, H/2] for int64 positions [T] of the documents between int32 ``cu_seqlens``
        [n+1], of each rotary embedding in use."""
        tables = []
        for known, rope in zip(self._frequencies, self.config.ropes, strict=True):
            frequencies = known.to(positions.device)
            if rope.kind == "longrope":
                frequencies = by_document(frequencies, rope.original_max_position_embeddings, positions, cu_seqlens)
            tables.append(rope_tables(positions, frequencies, rope.attention_factor))
        return tuple(tables)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T, D] of int64 [T]."""
        hidden = self.embed_tokens(token_ids)
        if self.config.embedding_scale == 1.0:
            return hidden
        return hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype).item()

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output: Output = full_logits,
        *,
        prefixes: SharedPrefixes | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Run the decoder and hand the normed hidden states to ``output``.

        Args:
            token_ids: int64 [T]. positions: int64 [T], places in the document.
            cu_seqlens: int32 [n+1] boundaries of the segments. max_seqlen: longest segment, tokens.
            output: called as ``output(hidden_TD, head)`` *inside* this forward, while sharded weights are
                whole; a loss closes over its targets. Default: logits [T, V].
            cache: keys, values and states of the tokens before these, which these are added to; for generation.
            prefixes: where segments find the beginning of their documents, arrays on the model's device; None: every
                segment is a whole document.

        Returns:
            what ``output`` returns.

        Raises:
            ValueError: a document's length decides how its tokens turn (longrope), and they have turned otherwise, in a
                cache or in a beginning that a shorter document shares.
        """
        hidden = self.embed(token_ids)
        fused = has_fused_varlen(hidden.device, attention_dtype(hidden))
        layout = DocumentLayout.of(cu_seqlens, max_seqlen, fused=fused, prefixes=prefixes, cache=cache)
        if self.config.rope_bounds:
            _check_lengths(self.config, layout)
        tables = self.rope_tables(positions, cu_seqlens)
        for layer in self.layers:
            hidden = layer(hidden, tables, layout)
        return output(self.norm(hidden), self.output_head)


def _check_lengths(config: DecoderConfig, layout: DocumentLayout) -> None:
    """Numbers of the host alone: nothing is read back from a device."""
    if layout.prefixes is not None and config.changes_rope(1, layout.prefixes.max_path):
        raise ValueError(
            f"documents of up to {layout.prefixes.max_path} tokens share beginnings, which turn otherwise in documents "
            f"of more than {min(config.rope_bounds)} tokens: pack them without sharing"
        )
    if layout.cache is None:
        return
    for number, (before, new) in enumerate(zip(layout.cache.lengths.tolist(), layout.host_lengths(), strict=False)):
        if config.changes_rope(before, before + new):
            raise ValueError(
                f"sequence {number} grows from {before} to {before + new} tokens, beyond which its kept keys turn "
                "otherwise: let the cache forget it, and give all of its tokens again"
            )


@cache
def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a configuration's decoder, in order; nothing is allocated. Do not change it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(spec: ModelSpec, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a spec, on a device; ``"meta"`` allocates nothing.

    Weights are NaN until they are loaded (``checkpoint.hf.load_hf_weights``) or initialised
    (``models.scratch.init_weights``), so that a forgotten parameter shows in the first loss. ``dtype`` is that of all
    parameters whose definition does not name its own.
    """
    with torch.device("meta"), _default_dtype(dtype):
        model = Decoder(spec.config)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model
