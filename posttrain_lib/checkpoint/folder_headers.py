"""What a model folder's small files and headers tell before a byte of its weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from posttrain_lib.checkpoint.hf import check_entries
from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.checkpoint.verify_tokenizer import check_tokenizer
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.hf_spec import hf_spec_from_folder
from posttrain_lib.models.spec import ModelSpec


def check_folder_headers(folder: str | Path, backend: str, tokenizer: str | Path) -> None:
    """Refuse a folder that cannot be trained, by config.json, index, headers of the shards and tokenizer.json alone.

    The values of the weights are not looked at; ``checkpoint.hf.check_hf_folder`` and the gate do that.

    Args:
        folder: local Hugging Face folder; its weights may lie in a store (``checkpoint.weight_files``).
        backend: "native": the tensors are held against our definition, name by name; "hf": transformers has a class
            for it, which names its tensors itself.
        tokenizer: folder of the tokenizer that the model is trained with.

    Raises:
        ModelError: no such folder, a broken, unsupported or quantised config.json, no safetensors, a missing or
            truncated shard, a tensor that is missing, unexpected, or of a wrong shape or dtype, more tokens than rows.
    """
    if backend == "hf":
        # Of the spec, check_tokenizer reads what both kinds have.
        spec = cast("ModelSpec", hf_spec_from_folder(folder))
        read_headers(folder)
    else:
        spec = spec_from_folder(folder)
        check_entries(read_headers(folder), spec, folder)
    check_tokenizer(Path(tokenizer), spec)
