"""The ``export`` section: which checkpoint becomes a Hugging Face folder, and how it must prove itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain_lib.config.base import Section


class ExportConfig(Section):
    """Export and its verification."""

    checkpoint: Literal["best", "last"] = "best"
    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="dtype of the exported weights; source: that of the input model"
    )
    verify_vllm: bool = Field(True, description="load the export in vLLM and compare text and log-probs")
    prompts: int = Field(8, ge=1, description="held-out prompts used in the comparison")
    new_tokens: int = Field(16, ge=1)
    max_logprob_gap: float = Field(
        0.02,
        gt=0,
        description="largest |log-prob difference| to vLLM in fp32; vLLM packs and fuses its CPU linears, "
        "which moved log-probs by up to 0.005 on tiny random models, so four times that",
    )
