"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, in and out.

What the names of a family's files cannot say one to one is written in an exact form:

* Where the files keep several of our projections in one tensor (Phi-3's ``qkv_proj``), their adapters are one of the
  sum of their ranks: lora_A stacked, lora_B block-diagonal, alpha raised so that the scale stays. Projections that
  share one lora_A stay as they are. Reading gives each projection its rows of lora_B and a copy of lora_A.
* Experts are written expert by expert where the files keep them so, which vLLM serves and PEFT converts as it loads;
  where the files keep one tensor for all (gpt-oss), in PEFT's form for such parameters (``target_parameters``).
  Either is read. A projection of the experts without an adapter is written as one of zeros, for both readers want
  all three, and is left out when it is read.
* Embedding and head of a tied model have one adapter, written for both, with ``ensure_weight_tying``.
* A score head, which is trained whole, is written whole (``modules_to_save``).

The names are those of PEFT 0.21; vLLM reads the same files but for DoRA, and it knows one alpha for the whole adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_lib.checkpoint.adapter_places import PREFIX, Place, Values, joined, named_tensors, places_of
from posttrain_lib.checkpoint.adapter_reader import AdapterReader, by_module, read_config
from posttrain_lib.checkpoint.hf import stored_name
from posttrain_lib.checkpoint.weights_digest import weights_digest
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.lora import (
    EMBEDDING,
    HEAD,
    Adapted,
    LoraDecoder,
    LoraSettings,
    adapt,
    adaptable_weights,
    merge,
    planned_adapters,
    row_lengths,
    whole,
)
from posttrain_lib.models.score import SCORE
from posttrain_lib.models.spec import ModelSpec

CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    model: LoraDecoder, spec: ModelSpec, folder: str | Path, base: str | None = None, revision: str | None = None
) -> list[str]:
    """Write the adapters of a model, whole or sharded (every rank calls, the first writes).

    Args:
        folder: created; publishing it atomically is the caller's job.
        base: what the configuration calls the base model: a folder or a hub id; ``revision``: of a hub id.

    Returns:
        what a reader of the folder cannot do with it, sentences for a person; empty if PEFT and vLLM both can.
    """
    parameters = dict(model.named_parameters())
    values = {
        name: _without_padding(
            Values(adapted, **{kind: _on_host(parameters[part]) for kind, part in adapted.parts.items()}), spec
        )
        for name, adapted in model.adapters.items()
    }
    values = _with_whole_experts(values, model)
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, Adapted] = {}
    places = places_of(model, spec)
    for place in places:
        present = [member for member in place.members if member.name in values]
        if not present:
            continue
        found = joined(place, present, values)
        if found.magnitude is not None:
            found = replace(found, magnitude=_all_lengths(place, found.magnitude, values, parameters))
        tensors.update(named_tensors(place, found))
        kinds[place.key] = found.adapted
    tied = model.config.tie_word_embeddings and EMBEDDING in values
    if tied:
        head = stored_name(spec, HEAD).removesuffix(".weight")
        tensors[f"{PREFIX}{head}.lora_A.weight"] = values[EMBEDDING].up.t().contiguous()
        tensors[f"{PREFIX}{head}.lora_B.weight"] = values[EMBEDDING].down.t().contiguous()
    if model.score is not None:
        tensors[PREFIX + SCORE] = _on_host(model.score.weight)
    config, remarks = _configuration(kinds, places, tied=tied)
    if model.score is not None:
        config.update(task_type="SEQ_CLS", modules_to_save=["score"])
    if not dist.is_initialized() or dist.get_rank() == 0:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / ADAPTER_FILE, metadata={"format": "pt"})
        named = {"base_model_name_or_path": base, "revision": revision}
        text = json.dumps({**named, **config}, indent=2, sort_keys=True)
        (out / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return remarks


def adapters_trajectory(model: LoraDecoder) -> dict[str, Any]:
    """What a run with adapters depends on besides its train section, JSON-ready: the adapters, and the base's bits.

    Every rank calls this; the layout changes nothing.
    """
    base = weights_digest((name, value) for name, value in model.named_parameters() if not value.requires_grad)
    return {"lora": [list(vars(adapted).values()) for adapted in model.adapters.values()], "lora_base": base}


def trained_weights(
    model: Decoder, state: Mapping[str, Tensor], settings: LoraSettings | Any | None
) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, by our names.

    Args:
        model: the base with its weights as they are stored, whole, without adapters.
        state: the checkpoint's: all weights, or with ``settings`` the adapters alone.
        settings: the run's adapters, which are merged; None: it has none.
    """
    if settings is None:
        return dict(state)
    return merge({**model.state_dict(), **state}, planned_adapters(model, settings))


def _on_host(parameter: Tensor) -> Tensor:
    return whole(parameter.detach()).cpu()


def _without_padding(value: Values, spec: ModelSpec) -> Values:
    """Without the vocabulary's rows that are in memory alone; nothing but zeros is there."""
    rows = spec.config.vocab_size
    if value.adapted.name == EMBEDDING:
        return replace(value, down=value.down[:, :rows])
    return replace(value, up=value.up[:rows]) if value.adapted.name == HEAD else value


def _with_whole_experts(values: Mapping[str, Values], model: Decoder) -> dict[str, Values]:
    """Zeros for the projections of experts that have no adapter beside some that have."""
    completed, parameters = dict(values), dict(model.named_parameters())
    for value in values.values():
        if value.down.dim() != 3:
            continue
        path = value.adapted.name.rpartition(".")[0]
        for name in (name for name in adaptable_weights(model) if name.startswith(f"{path}.")):
            if name not in completed:
                adapted = replace(value.adapted, name=name)
                shapes = adapted.shapes(parameters[name].shape)
                completed[name] = Values(adapted, *(torch.zeros(shapes[kind]) for kind in ("down", "up")))
    return completed


def _all_lengths(
    place: Place, magnitude: Tensor, values: Mapping[str, Values], parameters: Mapping[str, Tensor]
) -> Tensor:
    """DoRA of a part of a stored tensor: the other rows keep the lengths that the base gives them."""
    for member in place.members:
        if member.name not in values:
            magnitude[member.rows] = row_lengths(_on_host(parameters[member.name])).to(magnitude.dtype)
    return magnitude


def _configuration(
    kinds: Mapping[str, Adapted], places: Sequence[Place], *, tied: bool
) -> tuple[dict[str, Any], list[str]]:
    """adapter_config.json and the remarks on it; ``kinds``: the adapter of each key."""
    per_expert = {place.key for place in places if place.members[0].expert is not None}
    modules = [place.key for place in places if place.is_module]
    # The highest rank is the adapter's, so that vLLM's check against its own limit sees it.
    first = max(kinds.values(), key=lambda adapted: adapted.rank)
    # PEFT doubles alpha and rank as it joins experts' gate and up, which keeps alpha / rank alone.
    rslora = first.rslora and not per_expert & set(kinds)

    def alpha(adapted: Adapted) -> float:
        exact = adapted.alpha if rslora == adapted.rslora else adapted.scale * adapted.rank
        return int(exact) if float(exact).is_integer() else exact

    apart = {key: kind for key, kind in kinds.items() if (kind.rank, alpha(kind)) != (first.rank, alpha(first))}
    ranks = {key: kind.rank for key, kind in apart.items() if kind.rank != first.rank}
    alphas = {key: alpha(kind) for key, kind in apart.items() if alpha(kind) != alpha(first)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.rank,
        "lora_alpha": alpha(first),
        "use_rslora": rslora,
        "use_dora": first.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "ensure_weight_tying": tied,
        "target_modules": _short([key for key in modules if key in kinds], modules),
        "target_parameters": _short([key for key in kinds if key not in modules], kinds) or None,
        "rank_pattern": {name: ranks[_any(name, ranks)] for name in _short_by_value(ranks, kinds)},
        "alpha_pattern": {name: alphas[_any(name, alphas)] for name in _short_by_value(alphas, kinds)},
    }
    return config, _remarks(kinds, per_expert)


def _remarks(kinds: Mapping[str, Adapted], per_expert: set[str]) -> list[str]:
    remarks = []
    if any(kind.dora for kind in kinds.values()):
        remarks.append("vLLM does not serve DoRA: give it the merged weights")
    if len({round(kind.scale, 12) for kind in kinds.values()}) > 1:
        remarks.append("the adapters' scales differ, and vLLM knows one for all: give it the merged weights")
    leaves = {key.rpartition(".")[2] for key in per_expert}
    lost = sorted(key for key in kinds if key not in per_expert and key.rpartition(".")[2] in leaves)
    if lost:
        remarks.append(
            f"PEFT takes the names of dense and shared feed-forwards for the experts' and leaves {len(lost)} modules "
            f"out ({lost[0]}, ...): give it the merged weights"
        )
    return remarks


def _short(keys: Sequence[str], every: Iterable[str]) -> list[str]:
    """The last parts of names where they mean these and no others, otherwise the full names."""
    chosen, leaves = set(keys), [key.rpartition(".")[2] for key in keys]
    missed = {key.rpartition(".")[2] for key in every if key not in chosen}
    return list(dict.fromkeys(key if leaf in missed else leaf for key, leaf in zip(keys, leaves, strict=True)))


def _short_by_value(values: Mapping[str, float], every: Iterable[str]) -> list[str]:
    """The same for names that have values: the last part stands only for names of one value."""
    names, shortened = list(every), []
    for value in dict.fromkeys(values.values()):
        shortened += _short([key for key in values if values[key] == value], names)
    return shortened


def _any(name: str, keys: Iterable[str]) -> str:
    return next(key for key in keys if key == name or key.endswith(f".{name}"))


def load_adapter(model: Decoder, spec: ModelSpec, folder: str | Path) -> LoraDecoder:
    """Give a model the adapters of a folder in PEFT's format, in place; the model has its weights, whole.

    Raises:
        ModelError: no such folder, a setting or tensor that this decoder has no place for, shapes that do not fit,
            an adapter of one of a tied model's embedding and head alone.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE, scores=model.config.score_head)
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError("the adapter's weights cannot be read", where=folder / ADAPTER_FILE, got=error) from error
    if model.score is not None:
        _read_score(model.score.weight, tensors.pop(PREFIX + SCORE, None), spec, folder / ADAPTER_FILE)
    modules = by_module(tensors, folder / ADAPTER_FILE)
    reader = AdapterReader(model, spec, config, folder / ADAPTER_FILE)
    reader.check_bases(modules)
    values = reader.values({module: kinds for module, kinds in modules.items() if set(kinds) != {"base"}})
    order = {name: number for number, name in enumerate(adaptable_weights(model))}
    plan = [values[name].adapted for name in sorted(values, key=order.__getitem__)]
    adapted_model = adapt(model, plan)
    parameters = dict(adapted_model.named_parameters())
    with torch.no_grad():
        for value in values.values():
            for kind, part in value.adapted.parts.items():
                tensor = getattr(value, kind)
                # The vocabulary's padding has no adapter: zeros.
                parameters[part].zero_()[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return adapted_model


def _read_score(parameter: Tensor, given: Tensor | None, spec: ModelSpec, path: Path) -> None:
    """Fill the score head with the adapter's; one that brings none leaves the head that the base's folder holds."""
    if given is None and SCORE not in spec.initialised:
        return
    if given is None or given.shape != parameter.shape:
        raise ModelError(
            "the adapter's score head is missing, or is that of another model",
            where=f"{path}: {PREFIX}{SCORE}",
            got=None if given is None else tuple(given.shape),
            expected=tuple(parameter.shape),
            fix="check that the adapter was trained as a reward model of this base, with num_labels=1",
        )
    with torch.no_grad():
        parameter.copy_(given)
