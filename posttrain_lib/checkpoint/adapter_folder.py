"""What stands around an adapter's files: its base where no one else has it, a README, and the proof that they belong
together."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain_lib.checkpoint.adapters import load_adapter
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.verify_documents import furthest, largest
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import Adapted, LoraSettings, merge, planned_adapters
from posttrain_lib.models.spec import VOCABULARY_WEIGHTS, ModelSpec
from posttrain_lib.schema.manifests import Check

#: the base's folder inside the adapter's
BASE = "base"
README_FILE = "README.md"
_WEIGHTS = ".safetensors"
# Both sides are float64 sums of the same float32 numbers. What the file itself rounds, once and to float32, are DoRA's
# lengths of rows and the alpha of joined projections; a wrong row, rank, scale or base is off by orders more.
_ROUNDING = 2.0**-23


def put_base(source: Path, folder: Path) -> Path:
    """Put a base beside its adapter: ``folder/base`` has the files of ``source``. Weights are linked where the file
    system can, so that they take no second room; the rest, which a person may want to edit, is copied."""
    out = folder / BASE
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != _WEIGHTS or not _linked(path, target):
            shutil.copyfile(path, target)
    return out


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links: the copy that follows tells of a full disk
        return False
    return True


def write_readme(
    folder: Path, base: str, revision: str | None, *, enclosed: bool, remarks: Sequence[str], scores: bool = False
) -> None:
    """How to load the adapter, and what a reader cannot do with it, for a person.

    ``base``, ``revision``: as ``adapter_config.json`` has them; ``enclosed``: the base is in :data:`BASE`;
    ``scores``: the adapter makes a reward model of it.
    """
    if enclosed:
        arguments = f'"{BASE}"'
        which = (
            f"Its base is the folder `{BASE}` here, with tokenizer: the model as it was before training, which the run "
            f"made or gave new tokens. No other model has the same rows. `adapter_config.json` names\n`{base}`, where "
            "the same files stand on the machine of the run."
        )
    else:
        arguments = f'"{base}"' if revision is None else f'"{base}", revision="{revision}"'
        which = f"Its base is `{base}`" + ("." if revision is None else f", revision `{revision}`.")
    kind, head = ("SequenceClassification", ", num_labels=1") if scores else ("CausalLM", "")
    lines = [
        "# LoRA adapter in PEFT's format",
        "",
        which,
        "",
        "```python",
        "# from this folder",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}",
        "",
        f"base = AutoModelFor{kind}.from_pretrained({arguments}{head})",
        'model = PeftModel.from_pretrained(base, ".")',
        "```",
        *(["", "Remarks", ""] if remarks else []),
        *(f"- {remark}" for remark in remarks),
    ]
    (folder / README_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare_adapter(
    model: Decoder,
    state: Mapping[str, Tensor],
    settings: LoraSettings | Any,
    folder: Path,
    base: Path,
    spec: ModelSpec | None = None,
) -> Check:
    """Read an adapter and the base that it is for, and compare with what was trained, weight by weight.

    Args:
        model: the base that was trained on, whole, without adapters; it may have rows of padding.
        state: the checkpoint's adapters by their parameters' names.
        settings: the run's adapters.
        folder: the adapter's.
        base: the Hugging Face folder that a reader loads it on.
        spec: of that folder's model; default: as it is read. With a score head where the adapter brings one.

    Raises:
        ModelError: the adapter cannot be read, or does not fit on that base.
    """
    spec = spec_from_folder(base) if spec is None else spec
    unadapted = build_model(spec)
    load_hf_weights(unadapted, spec, base)
    read = load_adapter(unadapted, spec, folder)
    theirs, mine = read.state_dict(), {**model.state_dict(), **state}
    adapters = {adapted.name: adapted for adapted in planned_adapters(model, settings)}
    names, rows = [name for name, _ in model.named_parameters()], model.config.vocab_size
    found: dict[str, float] = {}
    for name in dict.fromkeys([*names, *spec.parameter_shapes()]):
        found[name] = math.inf
        if name in mine and name in theirs:
            wanted = _merged(mine, adapters.get(name), name)
            wanted = wanted[:rows] if name in VOCABULARY_WEIGHTS else wanted  # without rows that stand for no token
            found[name] = _apart(_merged(theirs, read.adapters.get(name), name), wanted)
    where, worst = furthest(found)
    said = f"furthest apart: {where}" if worst else "all weights are equal"
    return Check(
        "adapter on its base = trained weights",
        worst <= _ROUNDING,
        worst,
        _ROUNDING,
        f"{said}; difference relative to a weight's largest entry, in float64",
    )


def _merged(parameters: Mapping[str, Tensor], adapted: Adapted | None, name: str) -> Tensor:
    """One weight with its adapter in it, float64."""
    names = [name, *(() if adapted is None else adapted.parts.values())]
    return merge({part: parameters[part].double() for part in names}, () if adapted is None else (adapted,))[name]


def _apart(read: Tensor, wanted: Tensor) -> float:
    if read.shape != wanted.shape:
        return math.inf
    apart, size = largest(read - wanted), largest(wanted)
    if not apart:
        return 0.0
    return apart / size if size else math.inf
