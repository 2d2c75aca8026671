"""What can be proven of a model that runs as transformers' own class, and how it is written.

Our gate compares two implementations; here there is one. What still means something: the folder is whole, our output
head gives the class's own logits, no token sees a later one or another document, gradients are finite, and what is
written is what was read. Limits are multiples of the class's own rounding, as everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import MAX_SHARD_BYTES, config_with_dtype, copy_side_files
from posttrain_lib.checkpoint.hf_files import DTYPES, WEIGHT_SUFFIXES, read_headers
from posttrain_lib.checkpoint.verify_documents import Documents, largest, noise_limit, places
from posttrain_lib.checkpoint.verify_parameters import same_bits
from posttrain_lib.checkpoint.verify_report import Finding, VerificationReport, merged
from posttrain_lib.checkpoint.verify_tokenizer import check_tokenizer
from posttrain_lib.errors import ModelError
from posttrain_lib.lineage.digests import digest_file, list_files
from posttrain_lib.models.heads import hidden_states
from posttrain_lib.models.hf_decoder import HFDecoder, as_decoder, load_hf_decoder
from posttrain_lib.models.hf_spec import hf_spec_from_folder
from posttrain_lib.ops.output_head import OutputHead

if TYPE_CHECKING:
    from posttrain_lib.models.spec import ModelSpec

#: what the gate proves of our own definitions and nobody can prove of a class that is compared with itself
NOT_APPLICABLE: tuple[str, ...] = (
    "logits, hidden states and gradients against a second implementation, in float32 and bfloat16",
    "packed = alone, gradients (each document is a forward of its own)",
    "sharded = single",
    "LoRA at init = base",
    "cached generation = uncached",
    "positions far beyond the training length",
)
# Of different lengths, so that each is a forward of its own and packed must equal alone bit for bit.
_LENGTHS = (96, 1, 33, 2, 19)
# Weights and gradients in float32, the reference's in float64 beside them, and logits of _LENGTHS.
_BYTES_PER_PARAMETER = 20


def verify_hf_model(folder: str | Path, *, memory_limit_bytes: int | None = None, seed: int = 0) -> VerificationReport:
    """Check a folder whose model is to be trained as transformers' own class.

    Args:
        memory_limit_bytes: what the checks may use; default: half of the memory that is free.
        seed: of the random inputs.

    Raises:
        ModelError: the folder is incomplete, damaged or unsupported, or the checks do not fit into the limit.
    """
    folder = Path(folder)
    spec = hf_spec_from_folder(folder)
    named = cast("ModelSpec", spec)  # vocabulary, positions and config.json are all that is read of it below
    check_tokenizer(folder, named)
    needed = _BYTES_PER_PARAMETER * spec.parameters
    _check_memory(folder, needed, memory_limit_bytes)
    model = load_hf_decoder(spec, folder)
    _check_finite(model, folder)
    documents = Documents.random(named, _LENGTHS, seed)
    exact, theirs = (_reference_logits(folder, documents, dtype) for dtype in (torch.float64, torch.float32))
    floor = largest(theirs.double() - exact)
    ours = documents.packed_logits(as_decoder(model))
    apart, limit = largest(ours.double() - exact), noise_limit(floor, exact)
    findings = [
        Finding(
            "logits through the output head",
            apart,
            limit,
            f"against the class itself in float64, whose own float32 rounding is {floor:.2g}",
        ),
        _check_alone(model, documents),
        _check_causal(model, documents, limit),
        _check_gradients(model, documents),
        *_check_written(model, folder),
    ]
    return VerificationReport(
        folder=str(folder),
        family=spec.family,
        tier="hf",
        seed=seed,
        parameters=spec.parameters,
        documents=documents.lengths,
        noise_floor=floor,
        difference=apart,
        logit_scale=largest(exact),
        checks=tuple(merged(findings)),
        files={path.relative_to(folder).as_posix(): digest_file(path) for path in list_files(folder)},
        memory_estimate_bytes=needed,
    )


def _check_memory(folder: Path, needed: int, limit: int | None) -> None:
    from posttrain_lib.checkpoint.verify import free_memory_bytes

    limit = free_memory_bytes() // 2 if limit is None else limit
    if needed > limit:
        raise ModelError(
            "the model cannot be verified within the memory limit; with model.backend hf it is held whole",
            where=folder,
            got=f"limit of {limit / 2**30:.1f} GiB",
            expected=f"{needed / 2**30:.1f} GiB",
            fix="raise model.verification.memory_limit_gib, or use a machine with more memory",
        )


def _check_finite(model: HFDecoder, folder: Path) -> None:
    for name, parameter in model.inner.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise ModelError(
                "weights are NaN or infinite",
                where=f"{folder}: {name}",
                got=f"{bad} of {parameter.numel()} values",
                expected="finite weights",
                fix="fetch the file again, or go back to a checkpoint from before the model broke",
            )


def _reference_logits(folder: Path, documents: Documents, dtype: torch.dtype) -> Tensor:
    """[T, V] of the class loaded the plain way, each document by itself."""
    from posttrain_lib.adapters.hf_reference import load_reference

    reference = load_reference(folder, dtype=dtype)
    try:
        return documents.reference_logits(reference)
    except RuntimeError as error:
        raise ModelError(
            f"transformers' class does not run in {dtype}, by which its rounding is measured",
            where=f"{folder}: {type(reference).__name__}",
            got=error,
            fix="add a definition of the architecture (flows/convert_flow.py looks for one)",
        ) from error


def _check_alone(model: HFDecoder, documents: Documents) -> Finding:
    """Of the hidden states: the head's product rounds by the number of its rows, in our own definitions as well."""
    parts = documents.token_ids.split(documents.lengths)
    alone = torch.cat([_hidden_states(model, Documents(part, (len(part),))) for part in parts])
    different = int((alone != _hidden_states(model, documents)).any(dim=1).sum())
    reason = "tokens whose hidden states differ in any bit: documents of different lengths are forwards of their own"
    return Finding("packed = alone, bits", float(different), 0.0, reason)


@torch.no_grad()
def _hidden_states(model: HFDecoder, documents: Documents) -> Tensor:
    positions, boundaries = places(documents.lengths)
    hidden: Tensor = model(documents.token_ids, positions, boundaries, max(documents.lengths), hidden_states)
    return hidden


def _check_causal(model: HFDecoder, documents: Documents, limit: float) -> Finding:
    """A document's logits may not change with what comes after them: a bidirectional class would read its answers."""
    length = documents.lengths[0]
    first = documents.token_ids[:length]
    kept = length * 2 // 3
    other = torch.cat([first[:kept], first[kept:].flip(0)])
    before, after = (Documents(ids, (length,)).packed_logits(as_decoder(model))[:kept] for ids in (first, other))
    reason = f"logits of {kept} tokens, when the {length - kept} tokens after them are in another order"
    return Finding("no token sees a later one", largest(before - after), limit, reason)


def _check_gradients(model: HFDecoder, documents: Documents) -> Finding:
    def score(hidden: Tensor, head: OutputHead) -> Tensor:
        return head.logits(hidden).logsumexp(dim=-1).sum()

    positions, boundaries = places(documents.lengths)
    model(documents.token_ids, positions, boundaries, max(documents.lengths), score).backward()
    parameters = dict(model.inner.named_parameters())
    reached = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    wrong = [name for name, grad in reached.items() if not bool(torch.isfinite(grad).all())]
    model.zero_grad(set_to_none=True)
    reason = f"parameters with a gradient that is not finite; {len(reached)} of {len(parameters)} have one"
    return Finding("gradients are finite", float(len(wrong)), 0.0, reason, wrong[0] if wrong else None)


def _check_written(model: HFDecoder, folder: Path) -> list[Finding]:
    """Written in the folder's dtype and read back. Left out where the disk has no room for a copy."""
    dtype = stored_dtype(folder)
    size = model.spec.parameters * dtype.itemsize
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * size:
        return []
    with tempfile.TemporaryDirectory(prefix="verify-export-") as scratch:
        save_hf_model(model, model.state_dict(), folder, scratch, dtype, max_shard_bytes=size // 2 + 1)
        again = load_hf_decoder(model.spec, scratch).state_dict()
        renamed = set(read_headers(folder)) ^ set(read_headers(scratch))
    before = model.state_dict()
    # Of a folder that mixes dtypes the written one is float32, which holds them all.
    wrong = [name for name, value in before.items() if name not in again or not _same(again[name], value)]
    reason = (
        f"of {len(before)} parameters and buffers differ after transformers -> Hugging Face folder -> transformers; "
        f"{len(renamed)} stored names differ from the folder's"
    )
    return [Finding("export", float(len(wrong)), 0.0, reason, wrong[0] if wrong else None)]


def _same(left: Tensor, right: Tensor) -> bool:
    return same_bits(left, right) if right.is_floating_point() else torch.equal(left, right)


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of the folder's weights; float32 where it mixes several."""
    found = {entry.dtype for entry in read_headers(folder).values() if entry.dtype in DTYPES}
    return DTYPES[found.pop()] if len(found) == 1 else torch.float32


def save_hf_model(
    model: HFDecoder,
    state_dict: Mapping[str, Tensor],
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder: weights by transformers' own writer, the source's other files byte for byte.

    Args:
        model: says which class writes; its own weights do not matter.
        state_dict: the model's names -> whole tensors, any float dtype and device.
        source_folder, out_folder, dtype, max_shard_bytes: as of ``checkpoint.hf.save_hf_folder``.

    Raises:
        ModelError: the state dict is not the model's; a weight is NaN or infinite, or would be in ``dtype``.
    """
    from posttrain_lib.adapters.hf_reference_parts import quiet

    source, out = Path(source_folder), Path(out_folder)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    differing = sorted(set(state_dict) ^ set(model.state_dict()))
    if differing:
        raise ModelError("the state dict is not that of the model", where=", ".join(differing[:4]))
    tensors = {name.removeprefix("inner."): value for name, value in _all_written(model, state_dict, kind).items()}
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(source, out)
    save: Callable[..., None] = model.inner.save_pretrained  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as scratch, quiet():
        save(scratch, state_dict=tensors, max_shard_size=max_shard_bytes)
        for path in Path(scratch).iterdir():
            if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
                path.rename(out / path.name)
    (out / "config.json").write_text(config_with_dtype(model.spec.hf_config, kind), encoding="utf-8")


def _all_written(model: HFDecoder, state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to write; those that are one in the model are one object, which transformers writes once."""
    written: dict[str, Tensor] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, own in model.state_dict().items():
        other = first.setdefault((own.data_ptr(), own.shape), name)
        if other == name:
            written[name] = _written(name, state_dict[name], dtype)
        elif torch.equal(state_dict[name], state_dict[other]):
            written[name] = written[other]
        else:
            raise ModelError("two tensors that the model ties differ in the state dict", where=f"{name}, {other}")
    return written


def _written(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value.detach()
    written = value.detach().to(dtype)
    if not bool(torch.isfinite(written).all()):
        raise ModelError(
            "a weight is NaN or infinite in the dtype that it is to be written in",
            where=name,
            got=f"{value.dtype} with largest magnitude {value.abs().max().item():g}, written as {dtype}",
            expected="finite weights",
            fix="write bfloat16 or float32, or go back to a checkpoint from before the model broke",
        )
    return written
