"""The proof of an exported folder: what transformers loads from it computes what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posttrain_lib.adapters.hf_reference import load_reference, reference_logits
from posttrain_lib.checkpoint.hf_backend import stored_dtype
from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.checkpoint.verify_documents import Documents, largest, noise_limit
from posttrain_lib.checkpoint.verify_roundtrip import source_dtype
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.manifests import Check

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder


def exported_dtype(source: Path, wanted: str, backend: str = "native") -> str:
    """``wanted``, or for "source" the dtype of the input's weights (float32 where it mixes several)."""
    if wanted != "source":
        return wanted
    if backend == "hf":
        return str(stored_dtype(source)).removeprefix("torch.")
    return str(source_dtype(read_headers(source), spec_from_folder(source))).removeprefix("torch.")


def compare_with_reference(model: Decoder, folder: Path, prompts: Sequence[Sequence[int]]) -> list[Check]:
    """fp32 logits of ``model``, all prompts packed, against the folder loaded by transformers, each prompt alone.

    The limit is the gate's: a multiple of what rounding alone does to transformers' own logits (fp32 against fp64).
    """
    lengths = tuple(len(prompt) for prompt in prompts)
    documents = Documents(torch.tensor([token for prompt in prompts for token in prompt]), lengths)
    exact = torch.cat(_reference(folder, torch.float64, documents))
    theirs = torch.cat(_reference(folder, torch.float32, documents))
    ours = documents.packed_logits(model)[:, : model.config.vocab_size]
    floor, apart = largest(theirs.double() - exact), largest(ours.double() - exact)
    limit = noise_limit(floor, exact)
    return [
        Check(
            "logits of the export in transformers",
            apart <= limit,
            apart,
            limit,
            f"transformers' own rounding moves them by {floor:.2g}",
        )
    ]


def _reference(folder: Path, dtype: torch.dtype, documents: Documents) -> list[torch.Tensor]:
    reference = load_reference(folder, dtype=dtype)
    return [reference_logits(reference, part) for part in documents.token_ids.split(documents.lengths)]
