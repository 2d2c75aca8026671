"""SmolLM3 (``model_type: smollm3``): Llama's block; every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.llama import FAMILY as LLAMA
from posttrain_lib.models.families.shared import read_sizes
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' SmolLM3Config."""
    sizes = read_sizes(fields, positions=32768, key_value_heads=4, tied=True)
    bias = fields.boolean("attention_bias", False)
    rope = fields.rope(sizes.head_dim, sizes.positions, theta=2e6)
    every = fields.integer("no_rope_layer_interval", 4)
    turns = fields.integers("no_rope_layers", sizes.layers)  # 1 where there are positions
    turns = [int((layer + 1) % every != 0) for layer in range(sizes.layers)] if turns is None else turns
    window = fields.window() if fields.boolean("use_sliding_window", False) else None
    fields.skip("sliding_window")
    kinds = fields.layer_types(
        sizes.layers,
        ("full_attention", "sliding_attention"),
        lambda layer: "sliding_attention" if window is not None and not turns[layer] else "full_attention",
    )
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_act"), fields.boolean("mlp_bias", False))
    return sizes.decoder(
        LayerConfig(
            sizes.attention(
                rope=rope if turn else None,
                window=own,
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp,
        )
        for turn, own in zip(turns, fields.windows(kinds, window), strict=True)
    )


FAMILY = Family("smollm3", "SmolLM3ForCausalLM", read_config, LLAMA.rules)
