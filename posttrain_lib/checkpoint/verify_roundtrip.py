"""Hugging Face -> ours -> Hugging Face: the same names, shapes, dtypes and bits, the same tie, a true index."""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import DTYPES, INDEX_FILE, is_left_alone, save_hf_folder, side_files, to_stored
from posttrain_lib.checkpoint.hf_files import StoredTensors, TensorEntry, read_headers
from posttrain_lib.checkpoint.verify_parameters import same_bits
from posttrain_lib.checkpoint.verify_report import Finding
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.weights import Piece, stored_shapes

_DTYPE_FIELDS = ("dtype", "torch_dtype")


class RoundTrip:
    """Counts the stored tensors that our parameters do not give back bit for bit."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self._spec, self._stored = spec, StoredTensors(folder)
        self._shapes = spec.parameter_shapes()
        self._pieces: dict[str, list[Piece]] = {}
        for piece in spec.pieces:
            self._pieces.setdefault(piece.theirs, []).append(piece)
        self._compared: set[str] = set()
        self._wrong: list[str] = []

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Compare what lies in these parameters, by our name in the whole model."""
        for theirs, pieces in self._pieces.items():
            if any(piece.ours in parameters for piece in pieces):
                self._compared.add(theirs)
                if not self._same(theirs, pieces, parameters):
                    self._wrong.append(theirs)
        self._wrong.extend(name for name in parameters if name not in self._shapes)

    def _same(self, theirs: str, pieces: list[Piece], parameters: Mapping[str, Tensor]) -> bool:
        if any(
            piece.ours not in parameters or tuple(parameters[piece.ours].shape) != self._shapes[piece.ours]
            for piece in pieces
        ):
            return False
        value = self._stored.read(theirs)
        return same_bits(to_stored(pieces, parameters, value.shape, value.dtype), value)

    def finding(self) -> Finding:
        """The verdict; a stored tensor that no parameter gave back counts as wrong."""
        entries = self._stored.entries
        wanted = {name for name in entries if not is_left_alone(name, self._spec)}
        if self._spec.config.tie_word_embeddings:
            wanted &= set(self._pieces)  # a copy of the tied head was found equal, and is not kept
        wrong = [*self._wrong, *sorted(wanted ^ self._compared)]
        reason = (
            f"of {len(wanted)} stored tensors differ in name, shape or bits after Hugging Face -> ours -> Hugging Face"
        )
        return Finding("weights round trip", float(len(wrong)), 0.0, reason, wrong[0] if wrong else None)


def check_export(model: Decoder, spec: ModelSpec, folder: Path) -> list[Finding]:
    """What an export writes, in two shards, against the folder: headers, index, the tie, the other files.

    Left out where the disk has no room for a copy: the bits are compared tensor by tensor anyway.
    """
    entries = {name: entry for name, entry in read_headers(folder).items() if not is_left_alone(name, spec)}
    dtype = source_dtype(entries, spec)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in stored_shapes(spec.pieces).values())
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * total:
        return []
    with tempfile.TemporaryDirectory(prefix="verify-export-") as scratch:
        out = Path(scratch)
        save_hf_folder(dict(model.state_dict()), spec, folder, out, dtype, max_shard_bytes=total // 2 + 1)
        wrong = list(_differences(entries, read_headers(out), spec, dtype))
        wrong += _other_differences(folder, out, spec)
    reason = (
        f"tensors or files differ from the folder in name, shape, dtype, tie or content after an export{_first(wrong)}"
    )
    return [Finding("export", float(len(wrong)), 0.0, reason)]


def source_dtype(entries: Mapping[str, TensorEntry], spec: ModelSpec) -> torch.dtype:
    """The dtype of the folder's weights, apart from those that are always float32; float32 where it mixes several."""
    found = {entry.dtype for name, entry in entries.items() if name not in _always_wide(spec)}
    return DTYPES[found.pop()] if len(found) == 1 else torch.float32


def _always_wide(spec: ModelSpec) -> set[str]:
    return {piece.theirs for piece in spec.pieces if piece.float32}


def _differences(
    entries: Mapping[str, TensorEntry], written: Mapping[str, TensorEntry], spec: ModelSpec, dtype: torch.dtype
) -> Iterable[str]:
    """Tensors that differ in name, shape or dtype. A dtype may only become wider: where a folder mixes several, and
    where a tensor is always kept in float32."""
    kept = set(stored_shapes(spec.pieces)) if spec.config.tie_word_embeddings else set(entries)
    yield from sorted((set(entries) & kept) ^ set(written))
    mixed, wide = len({entry.dtype for entry in entries.values()}) > 1 and dtype == torch.float32, _always_wide(spec)
    for name in sorted(set(entries) & set(written)):
        before, after = entries[name], written[name]
        widened = after.dtype == "F32" and (mixed or name in wide)
        if before.shape != after.shape or (before.dtype != after.dtype and not widened):
            yield name


def _other_differences(folder: Path, out: Path, spec: ModelSpec) -> list[str]:
    """config.json but for the dtype, which follows the weights; the index, which must be there for two shards; and the
    files beside them, byte for byte."""
    before, after = (json.loads((place / "config.json").read_text("utf-8")) for place in (folder, out))
    wrong = [] if (out / INDEX_FILE).is_file() else [INDEX_FILE]
    for name in sorted(set(before) | set(after)):
        if (
            name not in _DTYPE_FIELDS
            and before.get(name) != after.get(name)
            and spec.hf_config.get(name) == before.get(name)
        ):
            wrong.append(f"config.json: {name}")
    _, changed, missing = filecmp.cmpfiles(folder, out, side_files(folder), shallow=False)
    return [*wrong, *changed, *missing]


def _first(wrong: list[str]) -> str:
    return f": {wrong[0]}" if wrong else ""
