"""Floating-point operations that the model needs for the useful tokens, and those that a run really does.

Counted as PaLM (Chowdhery et al. 2022, appendix B) does, made exact for packed rows and partly trained models: 2 per
token and entry of a matrix forward, 2 more where the gradient of its input is needed, 2 more where it is trained. The
head counts for *supervised* tokens alone (it skips the others), a score head once a document, experts for the tokens
that go through them. Attention goes by query-key pairs within documents, causal, windows as windows: half of the square
of a document's length, as is the custom; the diagonal's other half is not counted. Norms, lookups and padding are not
counted, and of data that was dropped before training nothing is. ``training.flop_graph`` walks the modules.

Where documents share their beginning, its tokens lie in the batch once and count once, as every other useful token:
what sharing saves is not in the count. A segment of m tokens after d shared ones has m * d + m^2 / 2 pairs in place of
m^2 / 2, so a whole tree has those of its documents less those of each beginning computed before.

What the same update can be had without is counted apart: model FLOPs give MFU, with these they give HFU. It is what
blocks compute again, and the forward of a frozen model (a reference, a teacher) that runs beside the trained one.
Kernels that form scores or logits again in their own backward (FlashAttention, the head where a loss goes on with
log-probs) do so in neither, as is the custom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.models.lora import apply_lora
from posttrain_lib.models.spec import AttentionConfig, Mixer
from posttrain_lib.parallel.recomputation import KEPT_SHARE, Recomputation
from posttrain_lib.training.flop_graph import BlockEnd, Product, products_of

if TYPE_CHECKING:
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class Flops:
    """``model``: what the useful tokens need of the trained model, forward and backward. ``recomputed``: what it did
    again besides. ``frozen``: the forward of a model that runs beside it."""

    model: float = 0.0
    recomputed: float = 0.0
    frozen: float = 0.0

    @property
    def hardware(self) -> float:
        """All that was done."""
        return self.model + self.recomputed + self.frozen

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.recomputed + other.recomputed, self.frozen + other.frozen)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.model * times, self.recomputed * times, self.frozen * times)


@dataclass(frozen=True)
class Recomputing:
    """What decides which products run again. ``device``: its type. ``half``: products in half precision.

    See ``parallel.recomputation`` for what each mode keeps.
    """

    mode: Recomputation = "none"
    compiled: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    half: bool = False


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a model for each useful token, each supervised one, each query-key pair by window, and each document (a
    score head's)."""

    token: Flops
    supervised: Flops
    pairs: Mapping[int | None, Flops] = field(default_factory=dict)
    document: Flops = Flops()

    @classmethod
    def of(
        cls, spec: ModelSpec | HFSpec, lora: Any | None = None, recomputing: Recomputing = Recomputing()
    ) -> FlopCount:
        """Of a model as it is trained: all of it, or the adapters of ``lora`` (``models.lora.LoraSettings``) alone.

        For a class of transformers an estimate, see :class:`~posttrain_lib.models.hf_spec.HFSpec`: a block computed
        again is a forward of the body, and with "selective" nothing is known and nothing counted.
        """
        if isinstance(spec, HFSpec):
            again = 1.0 if recomputing.mode == "full" else 0.0
            body, head = 2.0 * spec.body_parameters, 2.0 * spec.head_parameters
            pair = spec.flops_per_pair
            return cls(Flops(3 * body, again * body), Flops(3 * head), {None: Flops(pair, again * pair / 3)})
        model = build_model(spec, device="meta")
        return cls.of_model(model if lora is None else apply_lora(model, lora), recomputing)

    @classmethod
    def of_model(cls, model: Decoder, recomputing: Recomputing = Recomputing()) -> FlopCount:
        """Of a decoder that is not sharded; what of it is trained is read off its parameters."""
        products, ends = products_of(model)
        token, supervised, document = Flops(), Flops(), Flops()
        pairs: dict[int | None, Flops] = {}
        last = {product.block: number for number, product in enumerate(products)}
        for number, product in enumerate(products):
            again = product.again
            if product.block is not None and _runs_again(
                product, ends[product.block], last[product.block] == number, model, recomputing
            ):
                again += product.forward
            flops = Flops(product.forward + product.backward, again)
            if product.per == "token":
                token += flops
            elif product.per == "supervised":
                supervised += flops
            elif product.per == "document":
                document += flops
            else:
                pairs[product.window] = pairs.get(product.window, Flops()) + flops
        return cls(token, supervised, pairs, document)

    @classmethod
    def of_frozen(cls, spec: ModelSpec | HFSpec) -> FlopCount:
        """Of a model that only says something about the tokens: a forward, and nothing of it is ``model``."""
        if isinstance(spec, HFSpec):
            return cls.of(spec).map(lambda flops: Flops(frozen=flops.model / 3))
        found = cls.of_model(build_model(spec, device="meta").requires_grad_(False))
        return found.map(lambda flops: Flops(frozen=flops.model))

    def map(self, change: Callable[[Flops], Flops]) -> FlopCount:
        """The same with every entry changed."""
        pairs = {window: change(flops) for window, flops in self.pairs.items()}
        return FlopCount(change(self.token), change(self.supervised), pairs, change(self.document))

    def batch(self, batch: PackedBatch) -> Flops:
        """Of one packed batch (numpy), padding left out."""
        real = batch.document_ids >= 0
        lengths = np.diff(batch.cu_seqlens)[real]
        contexts = None if batch.prefixes is None else np.asarray(batch.prefixes.contexts)[real]
        total = self.token * batch.real_tokens + self.supervised * len(batch.supervised_index)
        total += self.document * int(real.sum())  # where a document's beginning is shared, the rest of it is a segment
        for window, flops in self.pairs.items():
            total += flops * causal_pairs(lengths, window, contexts)
        return total

    def batches(self, batches: Iterable[PackedBatch]) -> Flops:
        """Of a rank's micro-batches of one step."""
        return sum((self.batch(batch) for batch in batches), Flops())


def _runs_again(product: Product, end: BlockEnd, is_last: bool, model: Decoder, how: Recomputing) -> bool:
    """Whether a block's recomputation does this product. torch stops it at the last tensor that is asked for, so that
    the block's last product runs again only where something behind it kept its result; compiled code runs whole."""
    if how.mode == "none" or not end.flows:
        return False
    if is_last and not end.saved and not how.compiled:
        return False
    return how.mode == "full" or not _is_kept(product, model, how)


def _is_kept(product: Product, model: Decoder, how: Recomputing) -> bool:
    """What ``selective`` keeps."""
    long = product.inner > KEPT_SHARE * model.config.hidden_size
    if product.kind == "linear":
        return long and not how.compiled
    if product.kind == "grouped":  # where it is one kernel; a loop over experts has no operator to be kept under
        return long and how.device == "cuda" and how.half
    if product.kind == "recurrence":
        return False
    assert product.block is not None
    mixer = model.config.layers[product.block].attention
    return _has_kept_kernel(mixer, how)


def _has_kept_kernel(mixer: Mixer, how: Recomputing) -> bool:
    """Fused attention: everywhere without soft cap and sinks, on a CPU with sinks too (``ops.attention``)."""
    if not isinstance(mixer, AttentionConfig):
        return True
    return mixer.softcap is None and (not mixer.sinks or how.device == "cpu")


def causal_pairs(lengths: np.ndarray, window: int | None, contexts: np.ndarray | None = None) -> float:
    """Query-key pairs of causal attention over segments of these lengths, a query seeing at most ``window`` keys.

    Half of the full square, as is the custom; the diagonal's other half is not counted. ``contexts``: tokens of the
    document before each segment, keys but not queries; None = none before any.
    """
    if contexts is not None:
        return causal_pairs(contexts + lengths, window) - causal_pairs(contexts, window)
    lengths = lengths.astype(np.float64)
    if window is None:
        return float((lengths**2 / 2).sum())
    short = np.minimum(lengths, window)
    return float((short**2 / 2 + (lengths - short) * window).sum())


def batch_flops(spec: ModelSpec | HFSpec, batch: PackedBatch) -> float:
    """Model FLOPs of one packed batch (numpy) where all weights are trained."""
    return FlopCount.of(spec).batch(batch).model


def relative_pair_cost(spec: ModelSpec | HFSpec) -> float:
    """Cost of one query-key pair of attention over that of one token's matrix products, all layers and the head.

    For dealing rows out to ranks: it leaves out that masked tokens skip the head, windows, and what is not trained.
    """
    count = FlopCount.of(spec)
    return sum(pair.model for pair in count.pairs.values()) / (count.token.model + count.supervised.model)


def half_precision(precision: str) -> bool:
    """Whether products of a run in ``train.precision`` are in half precision."""
    return precision in ("bf16", "fp16")


def device_kind(device: torch.device) -> Literal["cpu", "cuda"]:
    """The kind of a device as :class:`Recomputing` has it."""
    return "cuda" if device.type == "cuda" else "cpu"
