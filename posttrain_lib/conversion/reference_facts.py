"""What can be learnt of an unknown architecture by asking transformers itself: values, shapes and outputs, no names.

For every field of config.json: what transformers takes where it is missing; and what changing it does: other
parameters, other logits, or nothing. That a field changes nothing is the evidence on which a definition may skip it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.errors import ModelError
from posttrain_lib.models.families.fields import HARMLESS

_TOKENS = 40
_LAYER = re.compile(r"\.\d+\.")
#: above this only the parameters are compared: each change of a field loads the model
_LARGEST_LOADED = 200_000_000
#: characters of a refusal that are kept: the first lines say it, what follows are hints
_MOST_SAID = 400


def reference_facts(folder: Path) -> dict[str, Any]:
    """{"defaults": {field: value}, "effects": {field: {"change", "result", "parameters", "said"}}} of a model folder.

    ``result``: "same" (bit for bit), "differs", "parameters" (others exist then, by their names, ``{n}`` for the
    layer), "refused" (transformers does not take the value; ``said`` is its reason), "not tried" (no other value of the
    kind is obvious, or the model is too large to load it again).
    """
    from transformers import AutoConfig

    from posttrain_lib.adapters.hf_reference import load_reference

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    defaults = json.loads(AutoConfig.for_model(content["model_type"]).to_json_string(use_diff=False))
    known = _parameters(content)
    loads = sum(torch.Size(shape).numel() for shape in known.values()) <= _LARGEST_LOADED
    base = _logits(load_reference(folder, dtype=torch.float32)) if loads else None
    effects = {}
    for field in sorted(set(content) - HARMLESS):
        if (value := _other(content[field])) is None:
            effects[field] = {"change": "", **_result("not tried")}
            continue
        changed = {**content, field: value}
        effects[field] = {"change": f"{content[field]!r} -> {value!r}", **_effect(folder, changed, known, base)}
    return {"defaults": {name: value for name, value in defaults.items() if name not in HARMLESS}, "effects": effects}


def _other(value: Any) -> Any:
    """Another value of the kind; None where none is obvious."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 if value else 0.5
    return None


def _effect(
    folder: Path, changed: Mapping[str, Any], known: Mapping[str, tuple[int, ...]], base: Tensor | None
) -> dict[str, Any]:
    from huggingface_hub.errors import StrictDataclassError

    from posttrain_lib.adapters.hf_reference import load_reference

    # What comes of a value that configuration, modules or tensors cannot be made with. No memory left, no file, or an
    # absent package says nothing of the value, and is not caught.
    refusals = (StrictDataclassError, ModelError, ArithmeticError, AttributeError, LookupError, RuntimeError)
    try:
        found = _parameters(changed)
        if found != known:
            return _result("parameters", sorted({_LAYER.sub(".{n}.", name) for name in set(found) ^ set(known)}))
        if base is None:
            return _result("not tried")
        logits = _logits(load_reference(folder, dtype=torch.float32, hf_config=changed))
        return _result("same" if torch.equal(logits, base) else "differs")
    except (*refusals, TypeError, ValueError) as error:
        return _result("refused", said=f"{type(error).__name__}: {error}"[:_MOST_SAID])


def _result(result: str, parameters: Sequence[str] = (), said: str = "") -> dict[str, Any]:
    return {"result": result, "parameters": list(parameters), "said": said}


def _parameters(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from posttrain_lib.adapters.hf_reference import build_reference

    with torch.device("meta"):
        model = build_reference(content, dtype=torch.float32)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def _logits(reference: Any) -> Tensor:
    from posttrain_lib.adapters.hf_reference import reference_logits

    vocabulary = reference.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    return reference_logits(reference, ids)


def random_reference(content: Mapping[str, Any]) -> Any:
    """transformers' model of a config.json with every parameter random: norms, biases, sinks, routers' corrections."""
    from posttrain_lib.adapters.hf_reference import build_reference

    torch.manual_seed(0)
    model = build_reference(content, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    corrections = (value for name, value in model.named_buffers() if name.endswith("correction_bias"))
    with torch.no_grad():
        for tensor in (*model.parameters(), *corrections):
            # Small products, norms about their neutral value: activations stay of order 1 through all layers.
            scale = 0.15 if tensor.dim() > 1 else 0.3
            tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    return model
