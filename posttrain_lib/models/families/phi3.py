"""Phi-3 and Phi-4 (``model_type: phi3``): q, k, v in one stored tensor, gate and up in another; optional window and
partial rotary embedding; longrope for contexts of 128k."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import EMBEDDING_AND_HEAD, PRE_NORM, linears, read_sizes, rows
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Phi3Config."""
    sizes = read_sizes(fields, positions=4096, eps=1e-5)
    for name in ("resid_pdrop", "embd_pdrop"):
        fields.one_of(name, (0, 0.0), 0.0)
    rope = fields.rope(
        sizes.head_dim,
        sizes.positions,
        partial=1.0,
        original=fields.integer("original_max_position_embeddings", 4096),
        renamed={"su": "longrope", "yarn": "longrope"},  # as transformers reads its older files
    )
    layer = LayerConfig(
        sizes.attention(rope=rope, window=fields.window()),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act")),
    )
    return sizes.decoder([layer] * sizes.layers)


GATE_UP = (
    rows("mlp.gate_up_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    *linears("mlp", "mlp", "down_proj"),
)
FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    read_config,
    (
        *EMBEDDING_AND_HEAD,
        *PRE_NORM,
        rows("self_attn.qkv_proj.weight", *(f"attention.{name}_proj.weight" for name in "qkv")),
        *linears("attention", "self_attn", "o_proj"),
        *GATE_UP,
    ),
)
