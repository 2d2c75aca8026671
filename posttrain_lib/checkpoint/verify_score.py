"""The gate of a reward model: that of its body and of its head at every token, and the scores of whole documents as
transformers gives them, which pads documents to one length and looks for their ends by the padding token's id."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain_lib.adapters.hf_reference import load_reference
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.verify import shrink_windows, verify_model
from posttrain_lib.checkpoint.verify_documents import Documents, largest, noise_limit
from posttrain_lib.checkpoint.verify_report import VerificationReport
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.manifests import Check

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import ModelSpec


def verify_score_model(
    folder: str | Path, *, tier: str = "light", memory_limit_bytes: int | None = None, seed: int = 0
) -> VerificationReport:
    """Check a sequence classification folder with one label, and compare our reward model of it with transformers'.

    The checks are those of :func:`~posttrain_lib.checkpoint.verify.verify_model`, where the score of every token stands
    for its logits, and :func:`compare_scores` of the same documents. In the tier "blocks", where transformers' whole
    model would not fit, the last is left out.

    Args:
        folder: Hugging Face model folder.
        tier, memory_limit_bytes, seed: as of ``verify_model``.

    Returns:
        the report; ``passed`` is False where the implementations disagree.

    Raises:
        ModelError: the folder is incomplete, damaged, unsupported or no reward model.
    """
    folder = Path(folder)
    spec = shrink_windows(_score_spec(folder))
    report = verify_model(folder, tier=tier, memory_limit_bytes=memory_limit_bytes, seed=seed)
    if report.tier == "blocks":
        return report
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    checks = compare_scores(model, folder, Documents.random(spec, report.documents, seed), spec)
    return dataclasses.replace(report, checks=(*report.checks, *checks))


def compare_scores(
    model: Decoder, folder: str | Path, documents: Documents, spec: ModelSpec | None = None
) -> list[Check]:
    """fp32 scores of ``model``, all documents in one row, against transformers', all padded to one length.

    The limit is the gate's: a multiple of what rounding to float32 does to transformers' own scores, of all tokens:
    the largest error of a few documents may be small by chance.

    Args:
        model: the reward model, with the folder's weights, on the CPU.
        folder: a sequence classification folder.
        documents: none of them ends with the padding token.
        spec: of the folder; default: as it is read. One with shrunk windows is compared with such a reference.

    Raises:
        ModelError: the folder is no reward model, or transformers does not load all of it.
    """
    spec = _score_spec(Path(folder)) if spec is None else spec
    reference = load_reference(folder, dtype=torch.float32, hf_config=spec.hf_config)
    padded = torch.empty(len(documents.lengths))
    with torch.no_grad():
        for batch in _padded(spec, documents):
            inputs = {"input_ids": batch.token_ids_BS, "attention_mask": batch.mask_BS}
            padded[batch.numbers] = reference.pooled(**inputs, use_cache=False)
    rounded = documents.reference_logits(reference).double()
    exact = documents.reference_logits(reference.double())  # never padded: its masks overflow the softmax's float32
    ends = torch.tensor(documents.lengths).cumsum(0) - 1
    ours = documents.packed_logits(model)[ends, 0]
    floor, apart = largest(rounded - exact), largest(ours - padded)
    limit = noise_limit(floor, exact)
    reason = (
        f"{len(ours)} documents, packed, and padded to one length in transformers, whose own rounding moves scores by "
        f"{floor:.2g}; a larger difference: another token is scored, or by another head"
    )
    return [Check("scores = transformers' of a padded batch", apart <= limit, apart, limit, reason)]


def _score_spec(folder: Path) -> ModelSpec:
    spec = spec_from_folder(folder)
    if not spec.config.score_head:
        raise ModelError(
            "the folder is no reward model",
            where=f"{folder}/config.json: architectures",
            got=spec.hf_config.get("architectures"),
            expected="the sequence classification class of its family",
        )
    return spec


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Documents ``numbers`` [B], padded behind: ids and attention mask int64 [B, S]."""

    numbers: Tensor
    token_ids_BS: Tensor
    mask_BS: Tensor


def _padded(spec: ModelSpec, documents: Documents) -> Iterator[_Batch]:
    """Batches of documents: one, or where a rotary embedding goes by the length, which transformers reads off the
    longest document of a batch, one for each set of frequencies. Without a padding token, documents stand alone."""
    padding, parts = spec.hf_config.get("pad_token_id"), documents.token_ids.split(documents.lengths)
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(documents.lengths):
        kind = number if padding is None else sum(length > bound for bound in spec.config.rope_bounds)
        groups.setdefault(kind, []).append(number)
    for numbers in groups.values():
        own = [parts[number] for number in numbers]
        token_ids = pad_sequence(own, batch_first=True, padding_value=padding or 0)
        mask = pad_sequence([torch.ones_like(part) for part in own], batch_first=True)
        yield _Batch(torch.tensor(numbers), token_ids, mask)
