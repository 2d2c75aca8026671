"""What a block keeps for its backward, and what it computes again (activation checkpointing).

``full`` keeps a block's input alone and runs the block once more in the backward. ``selective`` keeps besides what is
dear to compute for the room that it takes, by operator (as torchtitan's selective checkpointing does): the results of
the projections and of the fused attention kernels. Norms, rotary embeddings, activations, sums and the second product
of low-rank adapters, as wide as the projection's and over a few numbers each, are computed again. Both run the same
operators on the same numbers, so that loss and gradients are those of ``none``, bit for bit.

Our own autograd functions keep little by themselves, and a kernel's result is worth keeping only where nothing else of
it is needed again. Hence, with ``selective``:

* attention through fused kernels, with sinks on a CPU too: results kept. By products in pieces: computed again, for its
  tables are large and must not be kept. FlexAttention, compiled by itself, shows no operator: computed again.
* experts: the grouped kernel's results are kept. The loop over experts writes into buffers, which nothing can keep
  under an operator's name: computed again.
* the gated delta rule: computed again, for its backward needs all that lies between.
* compiled pieces (:mod:`posttrain_lib.parallel.compilation`): computed again, projections too, for the operators within
  cannot be told apart. Attention's results are kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder

#: none: keep everything; selective: what is dear to compute; full: the inputs of blocks
Recomputation = Literal["none", "selective", "full"]

#: Products whose results ``selective`` keeps, and the place of their left factor. Not aten::bmm: only tables of queries
#: times keys come out of it here. Not aten::mm.out: its result is a buffer that is written to again.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_grouped_mm": 0}
#: attention kernels whose results ``selective`` keeps
ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
#: a product is kept where it sums over more than this part of the hidden size
KEPT_SHARE = 1 / 8


def recompute_blocks(model: Decoder, mode: Recomputation) -> None:
    """Make every block of a model keep less, in place. No module appears, so that weights keep their names.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("none", "selective", "full"):
        raise ValueError(f"activation checkpointing {mode!r} is none of 'none', 'selective', 'full'")
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
    if mode == "selective":
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, partial(_policy, KEPT_SHARE * model.config.hidden_size)
        )
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _policy(narrow: float, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """``narrow``: products over at most so many numbers are cheap."""
    name = operator.name()
    kept = name in ATTENTION or (name in PRODUCTS and args[PRODUCTS[name]].shape[-1] > narrow)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
