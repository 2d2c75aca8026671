"""A model folder with new tokens: tokenizer, embedding and head grow together, and nothing else changes.

The files are spliced: bytes of old rows and of all other tensors are copied as they stand, so they are bit-equal
whatever their dtype, and memory stays flat. Old tokens keep their ids, and so their logits: each is the product of the
same hidden state with the same row.

Many models have rows behind the tokenizer's last id (Qwen3: 151,936 rows for 151,669 tokens). New tokens take those
first, and ``vocab_size`` grows only when they are used up; such a row is overwritten as any new one is begun.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import check_entries, copy_side_files, stored_name
from posttrain_lib.checkpoint.hf_files import DTYPES, INDEX_FILE, StoredTensors, TensorEntry, read_headers
from posttrain_lib.checkpoint.weight_files import copy_bytes, read_bytes
from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.growth_tokenizer import (
    NewToken,
    add_to_files,
    check_new,
    first_free_id,
    load_tokenizer,
    prove,
)
from posttrain_lib.models.spec import ModelSpec

Initialise = Literal["mean", "normal"]
#: what was added and how, beside the weights; a list, for a folder may grow again
RECORD = "added_vocabulary.json"

_ROWS_AT_A_TIME = 8192
_COPIED_AT_A_TIME = 16 << 20


@dataclass(frozen=True)
class Growth:
    """What a folder grew by: ids ``first_id`` to ``first_id + count - 1``, and ``vocab_size`` before and after."""

    first_id: int
    count: int
    vocab_size_before: int
    vocab_size: int


def grow_folder(
    source: str | Path,
    out: str | Path,
    new_tokens: Sequence[NewToken],
    *,
    initialise: Initialise,
    noise: float,
    seed: int,
) -> Growth:
    """Write a Hugging Face folder that is ``source`` with new tokens, in their order, behind its last id.

    Args:
        source: Hugging Face folder of a supported family, with its tokenizer.
        out: created; publishing it atomically is the caller's job.
        initialise: how rows of tokens without a description begin, in embedding and untied head alike:
            "mean": mean of the rows that tokens use, plus noise with ``noise`` times their covariance (Hewitt 2021,
            "Initializing new word embeddings for pretrained language models"): no new token then takes probability
            from the old ones before it is trained. "normal": 0, with the standard deviation that config.json gives to
            new weights (``initializer_range``, 0.02 by default).
            A token with a description begins as the mean of that text's rows, plus the same noise.
        noise: factor on the covariance; 0 = none. Hewitt takes 1e-5.
        seed: of the noise.

    Raises:
        ModelError: the folder is incomplete or its tokenizer larger than its embedding; a token is empty, double or
            known already, or its description has no token; config.json uses an id that a new token would get; the
            written folder does not prove itself.
    """
    source, out = Path(source), Path(out)
    spec = spec_from_folder(source)
    entries = read_headers(source)
    check_entries(entries, spec, source)
    tokenizer = load_tokenizer(source)
    check_new(tokenizer, new_tokens)
    first_id, before = first_free_id(tokenizer), spec.config.vocab_size
    if first_id > before:
        raise ModelError(
            "the tokenizer has more ids than the embedding has rows",
            where=source,
            got=f"ids up to {first_id - 1}",
            expected=f"ids below {before}, config.json's vocab_size",
            fix="use the tokenizer that belongs to these weights",
        )
    _check_control_ids(spec, range(first_id, first_id + len(new_tokens)), source)
    grown = Growth(first_id, len(new_tokens), before, max(before, first_id + len(new_tokens)))
    beginnings = _Beginnings(tokenizer, new_tokens, initialise, noise, _deviation(spec), seed)

    out.mkdir(parents=True, exist_ok=True)
    copy_side_files(source, out)
    add_to_files(out, new_tokens, first_id)
    _write_weights(StoredTensors(source, entries), spec, beginnings, grown, out)
    _write_config(source, out, grown)
    _write_record(out, new_tokens, grown, {"initialise": initialise, "noise": noise, "seed": seed})

    check_entries(read_headers(out), spec_from_folder(out), out)
    prove(out, tokenizer, new_tokens, first_id)
    return grown


def _check_control_ids(spec: ModelSpec, new_ids: range, source: Path) -> None:
    """Refuse to give a token an id that config.json has for padding or an end, though the tokenizer names no such."""
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = spec.hf_config.get(field)
        for index in given if isinstance(given, list) else [given]:
            if index in new_ids:
                raise ModelError(
                    "a new token would get an id that the model uses for another",
                    where=f"{source / 'config.json'}: {field}",
                    got=index,
                    expected=f"an id below {new_ids.start}, which the tokenizer knows",
                    fix="set the field to the id of a token that the tokenizer has",
                )


def _deviation(spec: ModelSpec) -> float:
    return float(spec.hf_config.get("initializer_range", 0.02))


class _Beginnings:
    """The first values of new rows. float32, whatever the rows are stored in."""

    def __init__(
        self,
        tokenizer: Any,
        tokens: Sequence[NewToken],
        initialise: Initialise,
        noise: float,
        deviation: float,
        seed: int,
    ) -> None:
        self.used = torch.zeros(first_free_id(tokenizer), dtype=torch.bool)
        self.used[list(tokenizer.get_vocab().values())] = True
        self.described = [_described(tokenizer, token) for token in tokens]
        self.initialise, self.noise, self.deviation, self.seed = initialise, noise, deviation, seed

    def rows(self, stored: StoredTensors, tensor: str) -> Tensor:
        """[N, D] for the stored embedding or head ``tensor``; each has its own random numbers."""
        size = stored.entries[tensor].shape[1]
        digest = hashlib.sha256(f"{self.seed}:{tensor}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if self.initialise == "normal":
            rows = torch.randn(len(self.described), size, generator=generator) * self.deviation
            if not any(self.described):
                return rows
        mean = self._mean(stored, tensor)
        if self.initialise == "mean":
            rows = mean.repeat(len(self.described), 1)
        for place, ids in enumerate(self.described):
            if ids:
                rows[place] = torch.cat([_read_rows(stored, tensor, index, index + 1) for index in ids]).mean(0)
        noisy = torch.tensor([self.initialise == "mean" or bool(ids) for ids in self.described])
        rows[noisy] += self._noise(stored, tensor, mean, generator)[noisy]
        return rows

    def _mean(self, stored: StoredTensors, tensor: str) -> Tensor:
        total = torch.zeros(stored.entries[tensor].shape[1], dtype=torch.float64)
        for rows in self._used_rows(stored, tensor):
            total += rows.sum(0, dtype=torch.float64)
        return (total / self.used.sum()).float()

    def _noise(self, stored: StoredTensors, tensor: str, mean: Tensor, generator: torch.Generator) -> Tensor:
        """Draws with ``noise`` times the rows' covariance, which is never formed: random sums of what the rows are off
        their mean by have just that."""
        total = torch.zeros(len(self.described), len(mean))
        if self.noise > 0:
            for rows in self._used_rows(stored, tensor):
                total += torch.randn(len(total), len(rows), generator=generator) @ (rows - mean)
        return total * math.sqrt(self.noise / int(self.used.sum()))

    def _used_rows(self, stored: StoredTensors, tensor: str) -> Iterator[Tensor]:
        for start in range(0, len(self.used), _ROWS_AT_A_TIME):
            end = min(start + _ROWS_AT_A_TIME, len(self.used))
            yield _read_rows(stored, tensor, start, end)[self.used[start:end]]


def _read_rows(stored: StoredTensors, tensor: str, begin: int, end: int) -> Tensor:
    """Rows of a stored matrix, float32."""
    return stored.read(tensor, (slice(begin, end),)).float()


def _described(tokenizer: Any, token: NewToken) -> list[int]:
    """Ids of a token's description; none where it has none."""
    if token.description is None:
        return []
    ids: list[int] = tokenizer(token.description, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(
            "the description of a new token is empty",
            where="model.vocabulary",
            got=repr(token.token),
            fix="leave it out",
        )
    return ids


def _write_weights(stored: StoredTensors, spec: ModelSpec, beginnings: _Beginnings, grown: Growth, out: Path) -> None:
    """Copy the weight files, with the new rows in embedding and head, and the index with the new total."""
    embedding, head = stored_name(spec, "embed_tokens.weight"), stored_name(spec, "lm_head.weight")
    rows = {embedding: beginnings.rows(stored, embedding)}
    if head in stored.entries:  # a stored copy of a tied head stays a copy
        rows[head] = rows[embedding] if spec.config.tie_word_embeddings else beginnings.rows(stored, head)
    for file in sorted({entry.file for entry in stored.entries.values()}):
        here = {name: value for name, value in rows.items() if stored.entries[name].file == file}
        with open(out / file, "wb") as new:
            if here:
                _splice(stored, file, new, here, grown)
            else:
                copy_bytes(stored.files, file, 0, stored.files.size(file), new)
    if INDEX_FILE in stored.files.names():
        content = json.loads(read_bytes(stored.files, INDEX_FILE, 0, stored.files.size(INDEX_FILE)))
        if "total_size" in content.get("metadata", {}):
            added = sum(_row_bytes(stored.entries[name]) for name in rows)
            content["metadata"]["total_size"] += added * (grown.vocab_size - grown.vocab_size_before)
        (out / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _row_bytes(entry: TensorEntry) -> int:
    return entry.shape[1] * DTYPES[entry.dtype].itemsize


def _splice(stored: StoredTensors, file: str, new: BinaryIO, rows: Mapping[str, Tensor], grown: Growth) -> None:
    """A safetensors file with new rows in some tensors; everything else, byte for byte and in the same order."""
    length = int.from_bytes(read_bytes(stored.files, file, 0, 8), "little")
    header = json.loads(read_bytes(stored.files, file, 8, 8 + length))
    parts: list[tuple[int, int] | bytes] = []  # what follows one another: a range of the old file, or new bytes
    end = 0
    names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    for name in names:
        entry = stored.entries[name]
        size = entry.end - entry.begin
        if name in rows:
            width = _row_bytes(entry)
            first, behind = (entry.begin + width * row for row in (grown.first_id, grown.first_id + grown.count))
            value = rows[name].to(DTYPES[entry.dtype]).contiguous().view(torch.uint8).numpy().tobytes()
            parts += [(entry.begin, first), value, (behind, entry.end)]
            size = width * grown.vocab_size
            header[name]["shape"] = [grown.vocab_size, *entry.shape[1:]]
        else:
            parts.append((entry.begin, entry.end))
        header[name]["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors to begin at whole words
    new.write(len(text).to_bytes(8, "little") + text)
    for part in parts:
        if isinstance(part, bytes):
            new.write(part)
        else:
            copy_bytes(stored.files, file, *part, new)


def _write_config(source: Path, out: Path, grown: Growth) -> None:
    """config.json, byte for byte where ``vocab_size`` stays."""
    if grown.vocab_size == grown.vocab_size_before:
        shutil.copyfile(source / "config.json", out / "config.json")
        return
    content = json.loads((source / "config.json").read_text(encoding="utf-8"))
    content["vocab_size"] = grown.vocab_size
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_record(out: Path, tokens: Sequence[NewToken], grown: Growth, how: Mapping[str, Any]) -> None:
    """Add to the folder's own list of what it grew by."""
    path = out / RECORD
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    record = {**asdict(grown), **how, "tokens": [asdict(token) for token in tokens]}
    path.write_text(json.dumps([*earlier, record], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
