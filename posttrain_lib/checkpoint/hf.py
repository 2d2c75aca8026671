"""Hugging Face folders in and out: safetensors, one tensor at a time, nothing dropped and nothing guessed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain_lib.errors import ModelError
from posttrain_lib.lineage.digests import digest_file
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Old Llama files carry the rotary table, which is computed from the configuration.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its shard, dtype as safetensors spells it, and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: str | Path) -> dict[str, TensorEntry]:
    """HF tensor name -> place, from the shards' headers alone.

    Raises:
        ModelError: no safetensors, a missing or truncated shard, a broken header or index.
    """
    folder = Path(folder)
    index = _read_index(folder)
    files = sorted(set(index.values())) if index is not None else [WEIGHTS_FILE]
    entries: dict[str, TensorEntry] = {}
    for name in files:
        for tensor, meta in _read_header(folder / name).items():
            if tensor in entries:
                raise ModelError(
                    "a tensor is in two shards",
                    where=f"{folder / name}: {tensor}",
                    got=entries[tensor].file,
                    fix="fetch the folder again",
                )
            entries[tensor] = TensorEntry(name, meta["dtype"], tuple(meta["shape"]))
    for tensor, name in (index or {}).items():
        if tensor not in entries or entries[tensor].file != name:
            raise ModelError(
                "the index names a tensor that its shard does not hold",
                where=f"{folder / name}: {tensor}",
                fix="fetch the folder again",
            )
    return entries


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard file name, None where there is a single file."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() and not path.is_file():
        return None
    if not path.is_file():
        other = sorted(item.name for item in folder.glob("*") if item.suffix in _WEIGHT_SUFFIXES)
        raise ModelError(
            "the model folder has no safetensors weights",
            where=folder,
            got=", ".join(other) or "no weight file",
            expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
            fix="convert the weights to safetensors (transformers: model.save_pretrained)" if other else "fetch them",
        )
    try:
        return {str(tensor): str(name) for tensor, name in json.loads(path.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError("the weight index is broken", where=path, got=error, fix="fetch the folder again") from error


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of one safetensors file, checked against the file's size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ModelError("a shard of the model is missing", where=path, fix="fetch the missing file") from error
    broken = "the file does not start like safetensors"
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ModelError(
                "a shard of the model is truncated or no safetensors file",
                where=path,
                got=f"{size} bytes",
                expected=f"a header of {length} bytes and the tensors behind it",
                fix="fetch the file again (a Git LFS pointer is no weight file)",
            )
        try:
            header = json.loads(handle.read(length))
            tensors = {name: meta for name, meta in header.items() if name != "__metadata__"}
            end = max((meta["data_offsets"][1] for meta in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(broken, where=path, got=error, fix="fetch the file again") from error
    if size != 8 + length + end:
        raise ModelError(
            "a shard of the model is truncated" if size < 8 + length + end else "a shard has bytes that belong nowhere",
            where=path,
            got=f"{size} bytes",
            expected=f"{8 + length + end} bytes by its own header",
            fix="fetch the file again",
        )
    return tensors


def check_entries(entries: Mapping[str, TensorEntry], spec: ModelSpec, folder: str | Path) -> None:
    """ModelError unless the files hold exactly the spec's tensors, in shapes and dtypes that can be loaded."""
    folder = Path(folder)
    shapes, names = spec.parameter_shapes(), spec.hf_names()
    expected = {names[ours]: shape for ours, shape in shapes.items()}
    missing = sorted(set(expected) - set(entries))
    if missing:
        raise ModelError(
            f"the weights lack {len(missing)} tensor(s)",
            where=f"{folder}: {missing[0]}",
            expected=", ".join(missing[:4]),
            fix="fetch the folder again, or correct config.json where it asks for tensors that the model does not have",
        )
    for tensor, entry in sorted(entries.items()):
        where = f"{folder / entry.file}: {tensor}"
        if tensor.endswith(_IGNORED_SUFFIX):
            continue
        if entry.dtype not in _DTYPES:
            raise ModelError(
                "a tensor has a dtype that cannot be trained",
                where=where,
                got=entry.dtype,
                expected="one of " + ", ".join(_DTYPES),
                fix="use the unquantised weights",
            )
        if tensor not in expected and not _is_tied_head(tensor, spec):
            raise ModelError(
                "the weights hold a tensor that the architecture has no place for",
                where=where,
                got=f"{entry.dtype} {list(entry.shape)}",
                fix="check that config.json belongs to these weights",
            )
        shape = expected.get(tensor, shapes["embed_tokens.weight"])
        if entry.shape != shape:
            raise ModelError(
                "a tensor has another shape than config.json says",
                where=where,
                got=list(entry.shape),
                expected=list(shape),
                fix="check that config.json belongs to these weights",
            )


def _is_tied_head(tensor: str, spec: ModelSpec) -> bool:
    """A stored copy of a tied head: allowed where it equals the embedding, which check_hf_folder sees to."""
    return spec.config.tie_word_embeddings and tensor == dict(spec.weight_map)["lm_head.weight"]


def check_hf_folder(folder: str | Path) -> dict[str, str]:
    """Prove that a model folder is whole and can be trained: config, every shard, every tensor.

    Returns:
        file name relative to the folder -> sha256, for every file.

    Raises:
        ModelError: naming file, tensor and what to do: unsupported architecture or field, missing or truncated
            shard, tensor missing, unexpected or of the wrong shape or dtype, NaN or infinite weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("the model folder does not exist", where=folder, fix="name a Hugging Face model folder")
    spec = spec_from_folder(folder)
    entries = read_headers(folder)
    check_entries(entries, spec, folder)
    for tensor, value in _read_tensors(folder, entries):
        if not _is_finite(value):
            count = int((~torch.isfinite(value)).sum())
            raise ModelError(
                "weights are NaN or infinite",
                where=f"{folder / entries[tensor].file}: {tensor}",
                got=f"{count} of {value.numel()} values",
                expected="finite weights",
                fix="fetch the file again, or go back to a checkpoint from before the model broke",
            )
        if _is_tied_head(tensor, spec):
            _check_tied_copy(folder, entries, tensor, value, spec)
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in _files(folder)}


def _check_tied_copy(
    folder: Path, entries: Mapping[str, TensorEntry], tensor: str, value: Tensor, spec: ModelSpec
) -> None:
    name = spec.hf_names()["embed_tokens.weight"]
    with safe_open(folder / entries[name].file, framework="pt") as shard:
        if not torch.equal(shard.get_tensor(name), value):
            raise ModelError(
                "config.json ties the output head to the embedding, but the stored head is another one",
                where=f"{folder / entries[tensor].file}: {tensor}",
                expected=f"the values of {name}",
                fix="set tie_word_embeddings to false if the head is meant to differ",
            )


def _read_tensors(folder: Path, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor) shard by shard; each tensor is a view of the mapped file, freed when the next is asked for."""
    by_file: dict[str, list[str]] = {}
    for tensor, entry in entries.items():
        if not tensor.endswith(_IGNORED_SUFFIX):
            by_file.setdefault(entry.file, []).append(tensor)
    for file, tensors in by_file.items():
        with safe_open(folder / file, framework="pt") as shard:
            for tensor in tensors:
                yield tensor, shard.get_tensor(tensor)


def iter_hf_weights(spec: ModelSpec, folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(our parameter name, tensor in the file's dtype) for every parameter, without a second full copy.

    Raises:
        ModelError: the files do not hold exactly the spec's tensors.
    """
    entries = read_headers(folder)
    check_entries(entries, spec, folder)
    ours = {theirs: name for name, theirs in spec.hf_names().items()}
    for tensor, value in _read_tensors(Path(folder), entries):
        if tensor in ours:  # a stored copy of a tied head is not
            yield ours[tensor], value


def load_hf_weights(model: nn.Module, spec: ModelSpec, folder: str | Path) -> None:
    """Fill the model's parameters, in place and in their own dtype and on their own device.

    ``model`` may be sharded (DTensor parameters): every rank reads each tensor and keeps its share.

    Raises:
        ModelError: as :func:`iter_hf_weights`.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in iter_hf_weights(spec, folder):
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                whole = value.to(device=parameter.device, dtype=parameter.dtype)
                # Every rank has read the same file: no broadcast from rank 0.
                share = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(share)
            else:
                parameter.copy_(value)


def save_hf_folder(
    state_dict: Mapping[str, Tensor],
    spec: ModelSpec,
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder: our weights under HF names, the source's other files byte for byte.

    Args:
        state_dict: our parameter names -> whole tensors, any float dtype and device.
        source_folder: where config.json, tokenizer, template and generation files come from.
        out_folder: created; publishing it atomically is the caller's job.
        dtype: of the written weights ("float32", "bfloat16", "float16" or the torch dtype); stated in config.json.
        max_shard_bytes: above this the weights are split and an index is written.

    Raises:
        ModelError: the state dict lacks a parameter, has one too many or of another shape; a weight is NaN or
            infinite, or would be in ``dtype``.
    """
    source, out = Path(source_folder), Path(out_folder)
    kind = _dtype(dtype)
    shapes, names = spec.parameter_shapes(), spec.hf_names()
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    if given != shapes:
        differing = sorted(dict(set(given.items()) ^ set(shapes.items())))
        raise ModelError(
            "the state dict is not that of the model's spec",
            where=", ".join(differing[:4]),
            got={name: given.get(name) for name in differing[:4]},
            expected={name: shapes.get(name) for name in differing[:4]},
        )
    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(source, out)
    shards = _plan_shards(shapes, kind.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names[name]: _writable(names[name], state_dict[name], kind) for name in shard}
        # transformers refuses files without this entry.
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(_bytes(shape, kind.itemsize) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / "config.json").write_text(config_with_dtype(spec.hf_config, kind), encoding="utf-8")


def _writable(name: str, value: Tensor, kind: torch.dtype) -> Tensor:
    written = value.detach().to("cpu", kind).contiguous()
    if not _is_finite(written):
        raise ModelError(
            "a weight is NaN or infinite in the dtype that it is to be written in",
            where=name,
            got=f"{value.dtype} with largest magnitude {value.detach().abs().max().item():g}, written as {kind}",
            expected="finite weights",
            fix="write bfloat16 or float32, or go back to a checkpoint from before the model broke",
        )
    return written


def _is_finite(value: Tensor) -> bool:
    # One reduction, no mask tensor: the float64 sum of finite float32 values is finite, NaN and infinity stay.
    return bool(torch.isfinite(value.sum(dtype=torch.float64)))


def copy_side_files(source: Path, out: Path) -> list[str]:
    """Copy everything but weights and config.json byte for byte: tokenizer, templates, generation defaults.

    Returns:
        the relative names of the copied files.
    """
    copied = []
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if path.suffix in _WEIGHT_SUFFIXES or name.endswith(".index.json") or name == "config.json":
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied.append(name)
    return copied


def config_with_dtype(hf_config: Mapping[str, Any], dtype: torch.dtype) -> str:
    """config.json's text with the weights' dtype, spelled ``dtype`` or ``torch_dtype`` as it already is."""
    content = dict(hf_config)
    spelled = [key for key in ("dtype", "torch_dtype") if key in content] or ["dtype"]
    content.update(dict.fromkeys(spelled, str(dtype).removeprefix("torch.")))
    return json.dumps(content, indent=2) + "\n"


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _bytes(shape, itemsize)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return torch.Size(shape).numel() * itemsize


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind is None or kind not in _DTYPES.values():
        raise ModelError(
            "weights cannot be written in this dtype",
            got=dtype,
            expected="float32, bfloat16 or float16",
        )
    return kind


def _files(folder: Path) -> list[Path]:
    """Files of the folder, hidden ones and the hub's own caches left out, sorted."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())
