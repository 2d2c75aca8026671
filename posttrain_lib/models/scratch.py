"""A randomly initialised model, written as a Hugging Face folder before anything else happens to it.

The default run and a downloaded model thereby walk the same road: folder, check, verification, training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import get_family, spec_from_config
from posttrain_lib.models.seeds import named_generator
from posttrain_lib.models.spec import ModelSpec

_INTO_THE_STREAM = ("o_proj", "down_proj", "out_proj")
# Set from the tokenizer or by this project; a run file that sets them as well would contradict itself.
_NOT_THEIRS = ("model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


def write_scratch_model(
    family: str, architecture: Mapping[str, Any], tokenizer_dir: str | Path, seed: int, out_dir: str | Path
) -> None:
    """Write config.json, model.safetensors, generation_config.json and a copy of the tokenizer to ``out_dir``.

    Args:
        family: a name in ``models.families.FAMILIES``.
        architecture: fields of the family's transformers configuration. ``vocab_size`` may be given to pad the
            embedding, and is the tokenizer's length otherwise.
        tokenizer_dir: Hugging Face tokenizer folder; its files are copied byte for byte.
        seed: of the weights; the same seed gives the same bytes on any machine and thread count.
        out_dir: created.

    Raises:
        ModelError: unknown family or field (naming the nearest), a vocabulary smaller than the tokenizer.
    """
    from safetensors.torch import save_file

    from posttrain_lib.adapters.hf_reference import architecture_config, tokenizer_facts
    from posttrain_lib.checkpoint.hf import copy_side_files, stored_tensors
    from posttrain_lib.checkpoint.hf_files import WEIGHTS_FILE

    kind = get_family(family, where="model.from_scratch.family")
    for name in _NOT_THEIRS:
        if name in architecture:
            raise ModelError(
                "this field is not the run file's to set",
                where=f"model.from_scratch.architecture.{name}",
                got=architecture[name],
                fix="remove it: it comes from the tokenizer or the family",
            )
    facts = tokenizer_facts(tokenizer_dir)
    tokens = facts.pop("length")
    vocab_size = architecture.get("vocab_size", tokens)
    if not isinstance(vocab_size, int) or vocab_size < tokens:
        raise ModelError(
            "the vocabulary is smaller than the tokenizer",
            where="model.from_scratch.architecture.vocab_size",
            got=vocab_size,
            expected=f"at least {tokens}",
            fix="leave vocab_size out",
        )
    content = architecture_config(kind.model_type, {**architecture, "vocab_size": vocab_size, **facts})
    content.update(architectures=[kind.architecture], dtype="float32")
    spec = spec_from_config(content, where="model.from_scratch.architecture")

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(Path(tokenizer_dir), out)
    weights = stored_tensors(spec, dict(initial_weights(spec, seed)), torch.float32)
    save_file(weights, out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, **{key: value for key, value in facts.items() if value is not None}}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def initial_weights(spec: ModelSpec, seed: int) -> list[tuple[str, Tensor]]:
    """(our name, float32 tensor) for every parameter.

    Normal with standard deviation ``initializer_range`` (0.02 by default), for the projections that write into the
    residual stream divided by sqrt(2 L), so that the stream's variance does not grow with depth (GPT-2's rule). Norms
    multiply by 1, biases and sinks are 0; the decay of linear attention is spread as Mamba's is (logarithm of uniform
    in (0, 16), time bias 1). Each tensor has its own generator, seeded by seed and name: a wider or deeper model leaves
    the others' values alone, and no order or thread count enters.
    """
    deviation = float(spec.hf_config.get("initializer_range", 0.02))
    residual = deviation / math.sqrt(2 * spec.config.num_hidden_layers)
    weights = []
    for name, shape in spec.parameter_shapes().items():
        generator = named_generator(seed, name)
        if name.endswith("dt_bias"):
            tensor = torch.ones(shape)
        elif name.endswith("A_log"):
            tensor = torch.empty(shape).uniform_(1e-3, 16.0, generator=generator).log_()
        elif name.endswith(("bias", "sinks")):
            tensor = torch.zeros(shape)
        elif len(shape) == 1:
            tensor = torch.full(shape, 0.0 if spec.config.norm.plus_one and not _is_plain_norm(name) else 1.0)
        else:
            scale = residual if name.removesuffix(".weight").endswith(_INTO_THE_STREAM) else deviation
            tensor = torch.empty(shape).normal_(0.0, scale, generator=generator)
        weights.append((name, tensor))
    return weights


def _is_plain_norm(name: str) -> bool:
    """The norm inside linear attention multiplies by its weight whatever the others do."""
    return name.endswith("attention.norm.weight")


def init_weights(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill a built model with :func:`initial_weights`, in place: for tests and benchmarks without a folder."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in initial_weights(spec, seed):
            parameters[name].copy_(tensor)
