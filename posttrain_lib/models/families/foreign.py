"""Checkpoints that are no plain weights of a decoder of ours: quantised ones, and models that bring their own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ModelError

#: quantisation -> how transformers undoes it, as the argument of from_pretrained
_UNDO = {
    "mxfp4": "quantization_config=transformers.Mxfp4Config(dequantize=True)",
    "fp8": "quantization_config=transformers.FineGrainedFP8Config(dequantize=True)",
}


def refuse_quantised(hf_config: Mapping[str, Any], where: str) -> None:
    """ModelError for a config.json that says its weights are quantised: rounded weights are another model to train."""
    given = hf_config.get("quantization_config")
    if given is None:
        return
    method = given.get("quant_method", "an unnamed method") if isinstance(given, Mapping) else given
    undo = _UNDO.get(str(method))
    fix = "use the maker's unquantised weights"
    if undo is not None:
        fix += (
            ", or write such a folder once: transformers.AutoModelForCausalLM.from_pretrained(FOLDER, "
            f"dtype='bfloat16', {undo}).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(
        "the checkpoint is quantised",
        where=f"{where}: quantization_config",
        got=method,
        expected="weights in float32, bfloat16 or float16",
        fix=fix,
    )


def refuse_own_code(hf_config: Mapping[str, Any], where: str) -> None:
    """ModelError for a model whose code lies in its folder (``auto_map``): code out of a model folder is not run.

    For architectures that have no definition of ours; those that have one need no code.
    """
    given = hf_config.get("auto_map")
    if given:
        names = sorted(map(str, given.values())) if isinstance(given, Mapping) else given
        raise ModelError(
            "the model brings its own code, which is not run",
            where=f"{where}: auto_map",
            got=names,
            expected="an architecture that is defined here",
            fix="read that code, and add a family for it to posttrain_lib/models/families",
        )
