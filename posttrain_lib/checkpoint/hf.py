"""Hugging Face folders in and out: safetensors, region by region, nothing dropped and nothing guessed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain_lib.checkpoint.hf_files import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    Region,
    StoredTensors,
    TensorEntry,
    read_headers,
)
from posttrain_lib.checkpoint.weight_files import StoreFiles, is_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.lineage.digests import digest_file
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import VOCABULARY_WEIGHTS, ModelSpec
from posttrain_lib.models.weights import Piece, clipped, stored_shapes

MAX_SHARD_BYTES = 5 << 30


def check_entries(entries: Mapping[str, TensorEntry], spec: ModelSpec, folder: str | Path) -> None:
    """ModelError unless the files hold exactly the spec's tensors, in shapes and dtypes that can be loaded."""
    expected = stored_shapes(spec.pieces_to_load)
    missing = sorted(set(expected) - set(entries))
    if missing:
        raise ModelError(
            f"the weights lack {len(missing)} tensor(s)",
            where=f"{folder}: {missing[0]}",
            expected=", ".join(missing[:4]),
            fix="fetch the folder again, or correct config.json where it asks for tensors that the model does not have",
        )
    for tensor, entry in sorted(entries.items()):
        where = f"{str(folder).rstrip('/')}/{entry.file}: {tensor}"
        if is_left_alone(tensor, spec):
            continue
        if entry.dtype not in DTYPES:
            raise ModelError(
                "a tensor has a dtype that cannot be trained",
                where=where,
                got=entry.dtype,
                expected="one of " + ", ".join(DTYPES),
                fix="use the unquantised weights",
            )
        if tensor not in expected and not _is_tied_head(tensor, spec):
            raise ModelError(
                "the weights hold a tensor that the architecture has no place for",
                where=where,
                got=f"{entry.dtype} {list(entry.shape)}",
                fix="check that config.json belongs to these weights",
            )
        shape = expected.get(tensor, spec.unpadded_shapes()["embed_tokens.weight"])
        if entry.shape != shape:
            raise ModelError(
                "a tensor has another shape than config.json says",
                where=where,
                got=list(entry.shape),
                expected=list(shape),
                fix="check that config.json belongs to these weights",
            )


def is_left_alone(tensor: str, spec: ModelSpec) -> bool:
    """A stored tensor that this decoder neither trains nor needs: Llama's old rotary table, which is computed from the
    configuration, and what the spec names (layers for multi-token prediction, the head that a score head replaces)."""
    named = spec.left_alone is not None and re.match(spec.left_alone, tensor) is not None
    return named or tensor.endswith(".rotary_emb.inv_freq")


def stored_name(spec: ModelSpec, ours: str) -> str:
    """The Hugging Face name of a parameter outside the layers."""
    return next(rule.theirs for rule in spec.rules if rule.ours == (ours,))


def _is_tied_head(tensor: str, spec: ModelSpec) -> bool:
    """A stored copy of a tied head: allowed where it equals the embedding, which check_hf_folder sees to."""
    return spec.config.tie_word_embeddings and tensor == stored_name(spec, "lm_head.weight")


def check_hf_folder(folder: str | Path) -> dict[str, str]:
    """Prove that a model folder is whole and can be trained: config, every shard, every tensor.

    Returns:
        file name relative to the folder -> sha256, for every file; of weights in a store, what it tells of the version.

    Raises:
        ModelError: naming file, tensor and what to do: unsupported architecture or field, missing or truncated
            shard, tensor missing, unexpected or of the wrong shape or dtype, NaN or infinite weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError("the model folder does not exist", where=folder, fix="name a Hugging Face model folder")
    spec = spec_from_folder(folder)
    stored = StoredTensors(folder)
    entries = stored.entries
    check_entries(entries, spec, folder)
    for tensor in (name for name in entries if not is_left_alone(name, spec)):
        value = stored.read(tensor)
        if not _is_finite(value):
            count = int((~torch.isfinite(value)).sum())
            raise ModelError(
                "weights are NaN or infinite",
                where=stored.where(tensor),
                got=f"{count} of {value.numel()} values",
                expected="finite weights",
                fix="fetch the file again, or go back to a checkpoint from before the model broke",
            )
        if _is_tied_head(tensor, spec):
            _check_tied_copy(stored, tensor, value, spec)
    found = {path.relative_to(folder).as_posix(): digest_file(path) for path in _files(folder)}
    if isinstance(stored.files, StoreFiles):
        for name in sorted({entry.file for entry in entries.values()}):
            found[name] = ", ".join(f"{field} {value}" for field, value in stored.files.pin(name).items())
    return found


def _check_tied_copy(stored: StoredTensors, tensor: str, value: Tensor, spec: ModelSpec) -> None:
    name = stored_name(spec, "embed_tokens.weight")
    if not torch.equal(stored.read(name), value):
        raise ModelError(
            "config.json ties the output head to the embedding, but the stored head is another one",
            where=stored.where(tensor),
            expected=f"the values of {name}",
            fix="set tie_word_embeddings to false if the head is meant to differ",
        )


def iter_hf_weights(spec: ModelSpec, folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(our parameter name, tensor in the file's dtype) for every parameter, one after the other; rows that pad the
    vocabulary are zero.

    Raises:
        ModelError: the files do not hold exactly the spec's tensors.
    """
    entries = read_headers(folder)
    check_entries(entries, spec, folder)
    stored = StoredTensors(folder, entries)
    shapes = spec.parameter_shapes()
    for name, pieces in pieces_by_parameter(spec).items():
        value = torch.empty(shapes[name], dtype=DTYPES[entries[pieces[0].theirs].dtype])
        fill_from(stored, pieces, value)
        _zero_padding(spec, name, value)
        yield name, value


def pieces_by_parameter(spec: ModelSpec) -> dict[str, list[Piece]]:
    """Our parameter name -> its pieces, of those that a folder of the spec holds."""
    found: dict[str, list[Piece]] = {}
    for piece in spec.pieces_to_load:
        found.setdefault(piece.ours, []).append(piece)
    return found


def fill_from(
    stored: StoredTensors, pieces: Sequence[Piece], local: Tensor, offset: Sequence[int] | None = None
) -> None:
    """Copy a parameter, or the block of it that begins at ``offset``, out of the files into ``local``, in place.

    Only the block's own regions are read.
    """
    stored.copy(regions_of(pieces, local, offset))


def regions_of(pieces: Sequence[Piece], local: Tensor, offset: Sequence[int] | None = None) -> Iterator[Region]:
    """The stored regions that make up a parameter, or the block of it that begins at ``offset``."""
    begin = tuple(offset) if offset is not None else (0,) * local.dim()
    for whole in pieces:
        part = clipped(whole, begin, tuple(local.shape))
        if part is not None:
            yield Region(part.theirs, part.their_index, local[part.our_index], part.transposed)


def load_hf_weights(model: nn.Module, spec: ModelSpec, folder: str | Path) -> None:
    """Fill the model's parameters, in place and in their own dtype and on their own device; rows that pad the
    vocabulary become zero. What the folder does not hold (``spec.initialised``) stays as it is.

    ``model`` may be sharded (DTensor parameters): a rank reads the regions of its own share and no other byte (of a
    matrix that is cut by columns, the whole of its rows). ``folder`` may be the URL of a store's folder, whose bytes go
    straight into the parameters, some ranges at a time.

    Raises:
        ModelError: as :func:`iter_hf_weights`, or a file in a store is missing, refused or was replaced.
        DataError: a store keeps failing.
    """
    stored, parameters = StoredTensors(folder), dict(model.named_parameters())
    check_entries(stored.entries, spec, folder)
    blocks = {name: local_block(parameters[name]) for name in pieces_by_parameter(spec)}
    with torch.no_grad():
        stored.copy(
            region
            for name, pieces in pieces_by_parameter(spec).items()
            for region in regions_of(pieces, *blocks[name])
            if blocks[name][0].numel()
        )
        for name, (local, offset) in blocks.items():
            if local.numel():
                _zero_padding(spec, name, local, offset)


def _zero_padding(spec: ModelSpec, name: str, local: Tensor, offset: Sequence[int] = (0,)) -> None:
    """Zero the rows of a parameter's block that stand for no token; ``offset``: where in the parameter it begins."""
    if name in VOCABULARY_WEIGHTS:
        local[max(0, spec.config.vocab_size - offset[0]) :].zero_()


def local_block(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(this rank's block of a parameter, where in the whole it begins)."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


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
    shapes = spec.parameter_shapes()
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
    stored = {name: (shape, _stored_dtype(name, spec, kind)) for name, shape in stored_shapes(spec.pieces).items()}
    shards = _plan_shards({name: _bytes(*facts) for name, facts in stored.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_stored_values(shard, spec, state_dict, stored))
        # transformers refuses files without this entry.
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(_bytes(*facts) for facts in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / "config.json").write_text(config_with_dtype(spec.hf_config, kind), encoding="utf-8")


def _stored_dtype(name: str, spec: ModelSpec, kind: torch.dtype) -> torch.dtype:
    """Some tensors stay float32 whatever the rest is written in, as transformers keeps them."""
    wide = any(piece.theirs == name and piece.float32 for piece in spec.pieces)
    return torch.float32 if wide else kind


def _stored_values(
    names: Sequence[str],
    spec: ModelSpec,
    state_dict: Mapping[str, Tensor],
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) to write, made of our parameters."""
    wanted: dict[str, list[Piece]] = {name: [] for name in names}
    for piece in spec.pieces:
        if piece.theirs in wanted:
            wanted[piece.theirs].append(piece)
    for name, pieces in wanted.items():
        shape, kind = stored[name]
        yield name, _writable(name, to_stored(pieces, state_dict, shape, kind), state_dict, pieces)


def stored_tensors(spec: ModelSpec, state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Hugging Face name -> tensor of a whole model, made of our parameters.

    Raises:
        ModelError: a weight is NaN or infinite, or would be in ``dtype``.
    """
    facts = {name: (shape, _stored_dtype(name, spec, dtype)) for name, shape in stored_shapes(spec.pieces).items()}
    return dict(_stored_values(list(facts), spec, state_dict, facts))


def to_stored(
    pieces: Sequence[Piece], parameters: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A stored tensor, made of the parameters that it holds."""
    value = torch.empty(tuple(shape), dtype=dtype)
    for piece in pieces:
        part = parameters[piece.ours].detach()[piece.our_index]
        value[piece.their_index].copy_(part.transpose(-1, -2) if piece.transposed else part)
    return value


def _writable(name: str, written: Tensor, state_dict: Mapping[str, Tensor], pieces: Sequence[Piece]) -> Tensor:
    if not _is_finite(written):
        given = state_dict[pieces[0].ours].detach()
        raise ModelError(
            "a weight is NaN or infinite in the dtype that it is to be written in",
            where=name,
            got=f"{given.dtype} with largest magnitude {given.abs().max().item():g}, written as {written.dtype}",
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
    copied = side_files(source)
    for name in copied:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    return copied


def side_files(folder: Path) -> list[str]:
    """Relative names of a model folder's files but for weights and config.json, hidden ones left out."""
    names = (path.relative_to(folder).as_posix() for path in _files(folder))
    return [name for name in names if not is_weights(name) and name != "config.json"]


def config_with_dtype(hf_config: Mapping[str, Any], dtype: torch.dtype) -> str:
    """config.json's text with the weights' dtype, spelled ``dtype`` or ``torch_dtype`` as it already is."""
    content = dict(hf_config)
    spelled = [key for key in ("dtype", "torch_dtype") if key in content] or ["dtype"]
    content.update(dict.fromkeys(spelled, str(dtype).removeprefix("torch.")))
    return json.dumps(content, indent=2) + "\n"


def _plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
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
