"""The vocabulary's size in memory: padded to what matrix products like, and without a trace anywhere else.

Kernels want rows that start at whole vectors and sizes that fill their tiles: nanoGPT as a whole became a quarter
faster when its vocabulary went from 50,257 to 50,304 (Karpathy 2023). So embedding and head get rows that stand for
no token:

* they are zero after loading (``checkpoint.hf``) and get no gradient, so weight decay and Adam leave them zero;
* the head gives them probability 0 (``ops.output_head``), in every loss, log-prob and sample;
* files never hold them: a parameter's pieces end where the vocabulary does.

New tokens, which do get a meaning, are ``models.growth``'s.
"""

from __future__ import annotations

import dataclasses

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import ModelSpec


def padded(vocab_size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``vocab_size``; ``multiple`` 1 = the vocabulary itself.

    Raises:
        ModelError: ``multiple`` is not positive.
    """
    if multiple < 1:
        raise ModelError(
            "the vocabulary cannot be padded to this multiple",
            where="model.vocabulary.pad_to_multiple_of",
            got=multiple,
            expected="a whole number of at least 1 (1 = no padding)",
        )
    return -(-vocab_size // multiple) * multiple


def with_padded_vocabulary(spec: ModelSpec, multiple: int) -> ModelSpec:
    """The spec of the same model whose embedding and head have rows in multiples of ``multiple``.

    Raises:
        ModelError: ``multiple`` is not positive.
    """
    rows = padded(spec.config.vocab_size, multiple)
    config = dataclasses.replace(spec.config, padded_vocab_size=None if rows == spec.config.vocab_size else rows)
    return dataclasses.replace(spec, config=config)
