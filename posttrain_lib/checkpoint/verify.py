"""The gate between a model folder and training: our decoder against transformers', from the same files.

What is compared, and with what tolerance:

* **Logits** of random packed documents, float32. The limit is not a number that somebody liked but the rounding noise
  of the reference itself, measured in the same run: the largest difference between its float32 and its float64
  logits, times :data:`NOISE_FACTOR`.
* **Weights**: every parameter, cast back to the file's dtype, has the file's bits.
* **Packed = alone**: the logits of a document do not depend on its neighbours (same limit), nor do gradients (one
  block of each kind, float64, where noise and leak are nine orders of magnitude apart).

Where the reference in float64 would not fit into memory, the *blocks* tier does the same one decoder block at a time.
On failure the modules are compared in order of execution, and the first wrong one is named.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from posttrain_lib.checkpoint.hf import check_hf_folder, iter_hf_weights, load_hf_weights
from posttrain_lib.checkpoint.verify_blocks import block_bytes, verify_blocks
from posttrain_lib.checkpoint.verify_checks import WeightsCheck, check_gradients
from posttrain_lib.checkpoint.verify_modules import (
    NOISE_FACTOR,
    Documents,
    compare_modules,
    largest,
    noise_limit,
    one_layer_spec,
)
from posttrain_lib.checkpoint.verify_report import VerificationReport, with_first_wrong
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import ModelSpec, parameter_count
from posttrain_lib.schema.manifests import Check

# Sliding windows are verified at this size at most, on both sides: which layers slide and where a window ends does
# not depend on its width, and a document longer than a real window (4096) would make the gate slow.
_WINDOW = 24
# Length 1 (no context at all), lengths around and past the window, one long enough for scaled rotary frequencies.
_LENGTHS = (7, 1, 33, 2, 96, 19)
_BYTES_LIGHT = 9  # per parameter: the float64 reference, and the tensor being converted
_BYTES_LOGITS = 32  # per logit: the reference's float32 and float64, ours packed and alone, and a float64 difference


def verify_model(
    folder: str | Path, *, tier: str = "light", memory_limit_bytes: int | None = None, seed: int = 0
) -> VerificationReport:
    """Check a folder, load it into our definition and compare with transformers.

    Args:
        folder: Hugging Face model folder.
        tier: "light" (whole model; goes block by block where that would not fit) or "blocks".
        memory_limit_bytes: what the comparison may use; default: half of the memory that is free.
        seed: of the random inputs.

    Returns:
        the report; ``passed`` is False where the implementations disagree.

    Raises:
        ModelError: the folder is incomplete, damaged or unsupported, or not even one block fits into the limit.
    """
    if tier not in ("light", "blocks"):
        raise ValueError(f"unknown verification tier {tier!r}")
    folder = Path(folder)
    files = check_hf_folder(folder)
    spec = shrink_windows(spec_from_folder(folder))
    limit = free_memory_bytes() // 2 if memory_limit_bytes is None else memory_limit_bytes
    documents = Documents.random(spec, _LENGTHS, seed)
    needed = light_bytes(spec, documents)
    if tier == "light" and needed <= limit:
        model = build_model(spec)
        load_hf_weights(model, spec, folder)
        report = verify_light(model, spec, folder, documents)
    else:
        needed = block_bytes(spec)
        if needed > limit:
            raise ModelError(
                "not even one decoder block can be verified within the memory limit",
                where=folder,
                got=f"limit of {limit / 2**30:.1f} GiB",
                expected=f"{needed / 2**30:.1f} GiB",
                fix="raise model.verification.memory_limit_gib, or use a machine with more memory",
            )
        report = verify_blocks(spec, folder, documents)
    return dataclasses.replace(report, seed=seed, files=files, memory_estimate_bytes=needed)


def light_bytes(spec: ModelSpec, documents: Documents) -> int:
    """Memory that the comparison of the whole model takes, in bytes."""
    logits = sum(documents.lengths) * spec.config.vocab_size
    return _BYTES_LIGHT * parameter_count(spec.config) + _BYTES_LOGITS * logits


def verify_light(model: Decoder, spec: ModelSpec, folder: Path, documents: Documents) -> VerificationReport:
    """Compare a loaded model with the whole reference."""
    from posttrain_lib.adapters.hf_reference import load_reference

    reference = load_reference(folder, dtype=torch.float32, hf_config=spec.hf_config)
    coarse = documents.reference_logits(reference)
    fine = documents.reference_logits(reference.double())
    del reference
    ours = documents.packed_logits(model)
    floor, difference = largest(coarse - fine), largest(ours - fine)
    limit = noise_limit(floor, fine)
    alone = torch.cat([documents.alone(index).packed_logits(model) for index in range(len(documents.lengths))])
    apart = largest(alone - ours)
    parameters, bits = dict(model.named_parameters()), WeightsCheck()
    for name, stored in iter_hf_weights(spec, folder):
        bits.add(name, parameters.get(name), stored)
    checks = [
        Check(
            "logits",
            difference <= limit,
            difference,
            limit,
            f"float32 logits against transformers' float64; its own float32 is {floor:.2e} away",
        ),
        bits.check(),
        Check(
            "packed = alone, logits",
            apart <= limit,
            apart,
            limit,
            f"documents of {', '.join(map(str, documents.lengths))} tokens in a row",
        ),
        *check_gradients(spec, lambda layer: _copy_block(model, spec, layer), documents.lengths),
    ]
    report = VerificationReport(
        folder=str(folder),
        family=spec.family,
        tier="light",
        seed=0,
        parameters=parameter_count(spec.config),
        documents=documents.lengths,
        noise_floor=floor,
        difference=difference,
        logit_scale=largest(fine),
        checks=tuple(checks),
    )
    if checks[0].passed:
        return report
    modules = compare_modules(
        model,
        spec,
        lambda dtype: load_reference(folder, dtype=dtype, hf_config=spec.hf_config),
        documents.packed_logits,
        documents.reference_logits,
        documents.positions,
    )
    return with_first_wrong(report, modules)


def _copy_block(model: Decoder, spec: ModelSpec, layer: int) -> Decoder:
    """A one-layer decoder with the layer's weights, apart from the model."""
    block = build_model(one_layer_spec(dataclasses.replace(spec, config=model.config), layer))
    block.layers[0].load_state_dict(model.layers[layer].state_dict())
    return block


def shrink_windows(spec: ModelSpec) -> ModelSpec:
    """The spec with sliding windows of at most ``_WINDOW``, in our configuration and in transformers'."""
    if not any(spec.config.windows):
        return spec
    windows = tuple(None if window is None else min(window, _WINDOW) for window in spec.config.windows)
    width = next(window for window in windows if window is not None)
    return dataclasses.replace(
        spec,
        config=dataclasses.replace(spec.config, windows=windows),
        hf_config={**spec.hf_config, "sliding_window": width},
    )


def free_memory_bytes() -> int:
    """Memory that a new allocation could have, of this machine or container, in bytes."""
    free = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return max(0, min(free))


__all__ = ["NOISE_FACTOR", "VerificationReport", "verify_model"]
