"""A model folder as a decoder in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.hf_decoder import as_decoder, load_hf_decoder
from posttrain_lib.models.hf_spec import hf_spec_from_folder
from posttrain_lib.models.score import init_score_head, with_score_head
from posttrain_lib.models.vocabulary import with_padded_vocabulary


def load_model(
    folder: str | Path,
    *,
    pad_vocabulary_to: int = 1,
    backend: Literal["native", "hf"] = "native",
    score_padding: int | None = None,
    seed: int = 0,
) -> Decoder:
    """The decoder of a Hugging Face folder, in fp32 on the CPU, without gradients.

    ``pad_vocabulary_to``: embedding and head have rows in multiples of it, as those of a checkpoint that is to be
    loaded into it. ``backend`` "hf": as transformers' own class, which is not padded. ``score_padding``: as a reward
    model with this padding token (``models.score``), whose head is as training with ``seed`` begins it.

    Raises:
        ModelError: the folder is incomplete, damaged or of an unsupported architecture.
    """
    if backend == "hf":
        return as_decoder(load_hf_decoder(hf_spec_from_folder(folder), folder)).requires_grad_(False)
    spec = with_padded_vocabulary(spec_from_folder(folder), pad_vocabulary_to)
    if score_padding is not None:
        spec = with_score_head(spec, score_padding)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, seed)
    return model.requires_grad_(False).eval()
