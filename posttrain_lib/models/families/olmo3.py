"""OLMo-3 (``model_type: olmo3``): OLMo-2's block, three sliding layers to a full one, yarn for longer contexts."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.olmo2 import RULES
from posttrain_lib.models.families.shared import read_sizes
from posttrain_lib.models.spec import POST_NORMS, DecoderConfig, LayerConfig, MLPConfig, NormConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Olmo3Config."""
    sizes = read_sizes(fields, positions=2048, eps=1e-5)
    bias, window = fields.boolean("attention_bias", False), fields.window(default=4096)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_act"))
    kinds = fields.layer_types(
        sizes.layers,
        ("full_attention", "sliding_attention"),
        lambda layer: "sliding_attention" if (layer + 1) % 4 else "full_attention",
    )
    return sizes.decoder(
        (
            LayerConfig(
                sizes.attention(rope=rope, window=window, qkv_bias=bias, o_bias=bias, qk_norm="projection"),
                mlp,
                POST_NORMS,
            )
            for window in fields.windows(kinds, window)
        ),
        NormConfig(sizes.eps, late_cast=True),
    )


FAMILY = Family("olmo3", "Olmo3ForCausalLM", read_config, RULES)
