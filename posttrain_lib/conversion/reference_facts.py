"""What can be learnt of an unknown architecture by asking transformers itself: values, shapes and outputs, no names.

For every field of config.json: what transformers takes where it is missing; and what changing it does: other
parameters, other logits, or nothing. That a field changes nothing is the evidence on which a definition may skip it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.models.families.fields import HARMLESS

_TOKENS = 40
_LAYER = re.compile(r"\.\d+\.")
#: above this only the parameters are compared: each change of a field loads the model
_LARGEST_LOADED = 200_000_000


def reference_facts(folder: Path) -> dict[str, Any]:
    """{"defaults": {field: value}, "effects": {field: {"change", "result", "parameters"}}} of a model folder.

    ``result``: "same" (bit for bit), "differs", "parameters" (others exist then, by their names, ``{n}`` for the
    layer), "refused" (transformers does not take the value), "not tried" (no other value of the kind is obvious, or the
    model is too large to load it again).
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
            effects[field] = {"change": "", "result": "not tried", "parameters": []}
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
    from posttrain_lib.adapters.hf_reference import load_reference

    try:
        found = _parameters(changed)
        if found != known:
            names = sorted({_LAYER.sub(".{n}.", name) for name in set(found) ^ set(known)})
            return {"result": "parameters", "parameters": names}
        if base is None:
            return {"result": "not tried", "parameters": []}
        logits = _logits(load_reference(folder, dtype=torch.float32, hf_config=changed))
        return {"result": "same" if torch.equal(logits, base) else "differs", "parameters": []}
    except Exception:  # whatever transformers says to a value that it does not take
        return {"result": "refused", "parameters": []}


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


def write_model(content: Mapping[str, Any], folder: Path) -> None:
    """transformers' model of a config.json with every parameter random, as a folder."""
    from posttrain_lib.adapters.hf_reference import build_reference

    torch.manual_seed(0)
    model = build_reference(content, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Small products, norms about their neutral value: activations stay of order 1 through all layers.
            scale = 0.15 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
