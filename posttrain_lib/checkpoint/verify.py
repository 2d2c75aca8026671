"""The gate between a model folder and training: our decoder against transformers', from the same files.

Every check is a difference and a limit, and no limit is a number that somebody liked: it is what rounding does to the
reference itself, measured in the same run (its float32 against its float64, its bfloat16 against its float32), times a
factor whose reason stands beside it (:data:`~posttrain_lib.checkpoint.verify_documents.NOISE_FACTOR`).

Where the whole reference would not fit into memory, the *blocks* tier does the same one part of the model at a time.
On failure the modules are compared in order of execution, and the first wrong one is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from posttrain_lib.checkpoint.hf import check_hf_folder, load_hf_weights
from posttrain_lib.checkpoint.verify_blocks import (
    Build,
    FolderWeights,
    block_bytes,
    build_part,
    parts_of,
)
from posttrain_lib.checkpoint.verify_checks import CHECKS
from posttrain_lib.checkpoint.verify_comparison import Comparison, parameters
from posttrain_lib.checkpoint.verify_documents import Documents, largest
from posttrain_lib.checkpoint.verify_modules import compare_modules
from posttrain_lib.checkpoint.verify_report import (
    Finding,
    ModuleDifference,
    VerificationReport,
    merged,
    with_first_wrong,
)
from posttrain_lib.checkpoint.verify_roundtrip import RoundTrip, check_export
from posttrain_lib.checkpoint.verify_subject import Subject, kinds_of
from posttrain_lib.checkpoint.verify_tokenizer import check_tokenizer
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import ModelSpec, parameter_count

# Sliding windows are verified at this size at most, on both sides: which layers slide and where a window ends does
# not depend on its width, and a document longer than a real window (4096) would make the gate slow.
_WINDOW = 24
# One long enough for scaled rotary frequencies, lengths around and past the window, length 1 (no context at all).
_LENGTHS = (96, 1, 33, 2, 19)
# The reference in float32, float64 and bfloat16, gradients of two of these in two layouts, ours with its gradients and
# in bfloat16. Measured: 44.
_BYTES_PER_PARAMETER = 48
_BYTES_PER_LOGIT = 80  # the reference's in four precisions and ours, with pull and differences in float64


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
    check_tokenizer(folder, spec)
    limit = free_memory_bytes() // 2 if memory_limit_bytes is None else memory_limit_bytes
    documents = Documents.random(spec, _LENGTHS, seed)
    needed = light_bytes(spec, documents)
    if tier == "light" and needed <= limit:
        model = build_model(spec)
        load_hf_weights(model, spec, folder)
        report = verify_light(model, spec, folder, documents, seed)
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
        report = verify_blocks(spec, folder, documents, seed)
    return dataclasses.replace(report, files=files, memory_estimate_bytes=needed)


def light_bytes(spec: ModelSpec, documents: Documents) -> int:
    """Memory that the comparison of the whole model takes, in bytes."""
    logits = sum(documents.lengths) * spec.config.vocab_size
    return _BYTES_PER_PARAMETER * parameter_count(spec.config) + _BYTES_PER_LOGIT * logits


def verify_light(
    model: Decoder, spec: ModelSpec, folder: Path, documents: Documents, seed: int = 0
) -> VerificationReport:
    """Compare a loaded model with the whole reference. ``spec`` is the folder's: ``model`` may be wrong."""
    from posttrain_lib.adapters.hf_reference import load_reference

    whole = Subject(
        spec=spec,
        model=model,
        inputs=documents.token_ids,
        lengths=documents.lengths,
        reference=lambda dtype: load_reference(folder, dtype=dtype, hf_config=spec.hf_config),
        stored=FolderWeights(spec, folder),
        kinds=kinds_of(spec.config.layers),
    )
    return _verify([Comparison(whole, seed)], "light", spec, folder, documents, seed)


def verify_blocks(
    spec: ModelSpec, folder: Path, documents: Documents, seed: int = 0, build: Build = build_part
) -> VerificationReport:
    """Compare part by part. ``build`` makes ours of a part, apart so that a test can make a wrong one."""
    return _verify(parts_of(spec, folder, documents, seed, build), "blocks", spec, folder, documents, seed)


def _verify(
    comparisons: Iterable[Comparison], tier: str, spec: ModelSpec, folder: Path, documents: Documents, seed: int
) -> VerificationReport:
    findings: list[Finding] = []
    compared: list[list[ModuleDifference]] = []
    located = False  # the first wrong block
    bits, worst = RoundTrip(spec, folder), (-1.0, 0.0, 0.0, 0.0)
    for it in comparisons:
        found = [finding for check in CHECKS for finding in check(it)]
        if tier == "light" and all(finding.passed for finding in found):  # a broken model may not even be writable
            found += check_export(it.subject.model, spec, folder)
        bits.add(_held(it.subject, spec, folder))
        wrong = any(not finding.passed for finding in found if finding.name.endswith("float32"))
        if wrong and not located:
            compared.append(compare_modules(it))
            located = it.subject.layer is not None
        exact = it.fine.output
        measured = (found[0].share, found[0].value, largest(it.coarse.output - exact), largest(exact))
        worst = max(worst, measured)
        findings += found
    findings.append(bits.finding())
    report = VerificationReport(
        folder=str(folder),
        family=spec.family,
        tier=tier,
        seed=seed,
        parameters=parameter_count(spec.config),
        documents=documents.lengths,
        noise_floor=worst[2],
        difference=worst[1],
        logit_scale=worst[3],
        checks=tuple(merged(findings)),
    )
    report = with_first_wrong(report, _first_executed(compared))
    if report.first_wrong_module is not None:
        return report
    failed = next((finding for finding in findings if not finding.passed), None)
    return report if failed is None else dataclasses.replace(report, first_wrong_module=failed.module)


def _first_executed(compared: list[list[ModuleDifference]]) -> list[ModuleDifference]:
    """What stands around the blocks is compared before them, though norm and head come after them."""
    for modules in compared:
        wrong = next((module.name for module in modules if not module.passed), "norm")
        if wrong not in ("norm", "lm_head", "score"):
            return modules
    return compared[0] if compared else []


def _held(subject: Subject, spec: ModelSpec, folder: Path) -> dict[str, Tensor]:
    """The parameters of a part under their names in the whole model. Where it has some rows of the vocabulary only,
    what loading makes of all of them stands in: the rows themselves are in what the part computes."""
    held = {subject.named(name): value.detach() for name, value in parameters(subject, subject.model).items()}
    if subject.layer is None and subject.spec.config.vocab_size != spec.config.vocab_size:
        weights = FolderWeights(spec, folder)
        for name in ("embed_tokens.weight", "lm_head.weight"):
            value = weights(name) if name in held else None
            if value is not None:
                held[name] = value
    return held


def shrink_windows(spec: ModelSpec) -> ModelSpec:
    """The spec with sliding windows of at most ``_WINDOW``, in our configuration and in transformers'."""
    windows = [layer.attention.window for layer in spec.config.layers if layer.attention.window is not None]
    if not windows:
        return spec
    layers = tuple(
        layer
        if layer.attention.window is None
        else dataclasses.replace(
            layer, attention=dataclasses.replace(layer.attention, window=min(layer.attention.window, _WINDOW))
        )
        for layer in spec.config.layers
    )
    return dataclasses.replace(
        spec,
        config=dataclasses.replace(spec.config, layers=layers),
        hf_config={**spec.hf_config, "sliding_window": min(windows[0], _WINDOW)},
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


__all__ = ["VerificationReport", "verify_model"]
