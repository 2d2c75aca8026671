"""A model folder as a decoder in this process."""

from __future__ import annotations

from pathlib import Path

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder


def load_model(folder: str | Path) -> Decoder:
    """The decoder of a Hugging Face folder, in fp32 on the CPU, without gradients.

    Raises:
        ModelError: the folder is incomplete, damaged or of an unsupported architecture.
    """
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model.requires_grad_(False).eval()
