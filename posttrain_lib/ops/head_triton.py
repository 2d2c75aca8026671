"""The output head's passes over a chunk's logits on a GPU, as Triton kernels: a program per row, sums in float32.

What torch does to a block of logits in a dozen passes and several temporary tensors takes two here:

* :func:`row_statistics` reads the products once and keeps a running maximum, sum and, for the entropy, mean in every
  lane (online softmax: Milakov and Gimelshein 2018), a few entries at a time, so that enough reads are in flight. With
  ``with_gradient`` it then reads the row again, much of it from the cache, and puts the gradient of the negative
  log-likelihood in its place.
* :func:`put_gradient` does the second half alone, for gradients that come from outside.

Passes over the products [C, V] of a chunk, beside those of the matrix products: two reads and a write, 6 bytes per
entry in half precision, against ``6 * D`` operations in the three products: in time, ``R / D`` of theirs, where R is
how many operations the device does while its memory moves a byte. With R = 250 and D = 4096 that is 6 %, less what
the cache holds of the second read.

Where products run in float64, on a CPU or without Triton, ``ops.head_chunks`` does the same in torch.
``TRITON_INTERPRET=1`` runs the kernels on a CPU's tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program puts the gradient of in place at a time, and its warps of 32 threads.
BLOCK = 8192
WARPS = 16
# Where it sums it takes DEEP entries in each of so many lanes: one maximum and one rescaled sum for them together, and
# so many more reads in flight for the same registers.
LANES = 4096
DEEP = 4
# Neighbours that a thread reads at once, in half precision: 16 bytes. A lane's entries must lie in one thread, so that
# its maximum and sum are no exchange between warps: lanes = warps * threads * neighbours.
_LANES_OF_A_WARP = 32 * 8
# A lane's maximum before it has seen an entry, and the logit of an entry that does not exist: below every logit, and
# finite, so that no difference of two of them is NaN.
_NOTHING = tl.constexpr(-1e30)


def row_statistics(
    products_CV: Tensor,
    targets_C: Tensor,
    entries: int,
    curve: tuple[float | None, float],
    *,
    with_entropy: bool = False,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, log-probability of the target and entropy of each row.

    Args:
        products_CV: [C, V] float32 or half precision, rows contiguous; C * V may exceed 2^31.
        targets_C: int64 [C]. A target outside of ``entries`` makes its row's log-probability NaN.
        entries: columns that exist; what the others hold does not matter.
        curve: (inner, outer) factors: ``logits = outer * tanh(inner * products)``, or with None for the first
            ``outer * products``.
        with_entropy: else the third result is 0.
        with_gradient: overwrite the products with the gradient of ``-log p(target)`` in them, but for the factor that
            is the curve's slope at 0; 0 at columns that do not exist.

    Returns:
        float32 (log_total_C, logprob_C, entropy_C).
    """
    rows, columns = products_CV.shape
    log_totals = torch.empty(rows, dtype=torch.float32, device=products_CV.device)
    logprobs, entropies = torch.empty_like(log_totals), torch.zeros_like(log_totals)
    inner, outer = curve
    with torch.cuda.device_of(products_CV):
        _statistics_kernel[(rows,)](
            products_CV,
            products_CV.stride(0),
            targets_C,
            log_totals,
            logprobs,
            entropies,
            columns,
            entries,
            inner or 0.0,
            outer,
            CAPPED=inner is not None,
            ENTROPY=with_entropy,
            GRADIENT=with_gradient,
            BLOCK=_block(columns),
            DEEP=DEEP,
            LANES=_lanes(columns),
            num_warps=max(1, min(WARPS, _lanes(columns) // _LANES_OF_A_WARP)),
        )
    return log_totals, logprobs, entropies


def put_gradient(
    products_CV: Tensor,
    targets_C: Tensor,
    entries: int,
    curve: tuple[float | None, float],
    log_totals_C: Tensor,
    pulls_C: Tensor,
    entropy_C: Tensor | None = None,
    entropy_pulls_C: Tensor | None = None,
) -> None:
    """Overwrite products with the gradient of ``pull * log p(target) + entropy_pull * entropy`` in them.

    Args:
        products_CV, targets_C, entries, curve: as :func:`row_statistics`, which gave ``log_totals_C``.
        pulls_C, entropy_pulls_C: float32 [C], any strides. entropy_C: float32 [C]. Both of the last or neither.
    """
    rows, columns = products_CV.shape
    inner, outer = curve
    pulls_C = pulls_C.contiguous()  # autograd expands the gradient of a sum
    entropy_pulls_C = None if entropy_pulls_C is None else entropy_pulls_C.contiguous()
    with torch.cuda.device_of(products_CV):
        _gradient_kernel[(rows,)](
            products_CV,
            products_CV.stride(0),
            targets_C,
            log_totals_C,
            pulls_C,
            entropy_C,
            entropy_pulls_C,
            columns,
            entries,
            inner or 0.0,
            outer,
            CAPPED=inner is not None,
            ENTROPY=entropy_C is not None,
            BLOCK=_block(columns),
            num_warps=WARPS,
        )


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * tensor`` in ``dtype``, the product formed in float32: in one pass, and in none for a factor of 1.

    Args:
        tensor: contiguous; overwritten where its dtype is the one asked for.
        factor: one number on the same device. The host does not wait for it.
    """
    in_place = tensor.dtype == dtype
    out = tensor if in_place else torch.empty_like(tensor, dtype=dtype)
    # large, so that few programs start where each finds a factor of 1
    block = 8192
    with torch.cuda.device_of(tensor):
        _scale_kernel[(triton.cdiv(tensor.numel(), block),)](
            tensor, factor, out, tensor.numel(), IN_PLACE=in_place, BLOCK=block, num_warps=8
        )
    return out


def put_scaled_rows(rows_ND: Tensor, factors_N: Tensor, out: Tensor, index_N: Tensor | None = None) -> Tensor:
    """``out[index] = factors * rows``, the products formed in float32; without ``index_N``, ``out = factors * rows``.

    Args:
        rows_ND, out: [N, D] and [N or more, D], contiguous, any float dtypes but float64.
        factors_N: float32, contiguous. index_N: int64 [N], distinct places in ``out``.

    Returns:
        ``out``.
    """
    rows, width = rows_ND.shape
    block = min(2048, triton.next_power_of_2(width))
    if rows:
        with torch.cuda.device_of(rows_ND):
            _scaled_rows_kernel[(rows, triton.cdiv(width, block))](
                rows_ND, factors_N, index_N, out, width, INDEXED=index_N is not None, BLOCK=block, num_warps=4
            )
    return out


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(columns))


def _lanes(columns: int) -> int:
    return min(LANES, triton.next_power_of_2(triton.cdiv(columns, DEEP)))


@triton.jit
def _to_logits(products, inner, outer, CAPPED: tl.constexpr):
    """(logits, what they multiply their gradient with, but for a constant factor)."""
    if CAPPED:
        # 1 - 2 / (e^2x + 1) is tanh x, exact at both ends where the exponential overflows or vanishes
        bounded = 1.0 - 2.0 / (tl.exp(2.0 * inner * products) + 1.0)
        steepness = 1.0 - bounded * bounded
        logits = outer * bounded
    else:
        steepness = 1.0
        logits = outer * products
    return logits, steepness


@triton.jit
def _put_row_gradient(
    products,
    target,
    log_total,
    pull,
    entropy,
    entropy_pull,
    columns,
    entries,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of ``pull * log p(target) + entropy_pull * entropy`` in a row's products, in their place.

    d log p(target) / d logit = (1 at the target) - p; d entropy / d logit = -p * (log p + entropy).
    """
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(products + at, mask=at < columns, other=0.0, eviction_policy="evict_first").to(tl.float32)
        logits, steepness = _to_logits(row, inner, outer, CAPPED)
        logprobs = logits - log_total
        pulls = pull
        if ENTROPY:
            pulls = pull + entropy_pull * (logprobs + entropy)
        gradient = -tl.exp(logprobs) * pulls
        gradient = tl.where(at == target, gradient + pull, gradient) * steepness
        # columns that do not exist can hold anything: replaced, not multiplied by 0
        gradient = tl.where(at < entries, gradient, 0.0)
        # read next by the product after the whole chunk: it should not push out of the cache what is still to be read
        gradient = gradient.to(products.dtype.element_ty)
        tl.store(products + at, gradient, mask=at < columns, eviction_policy="evict_first")


@triton.jit
def _statistics_kernel(
    products,
    stride,
    targets,
    log_totals,
    logprobs,
    entropies,
    columns,
    entries,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
):
    place = tl.program_id(0)
    products += place.to(tl.int64) * stride
    target = tl.load(targets + place)
    exists = (target >= 0) & (target < entries)
    at_target = tl.load(products + target, mask=exists, other=float("nan")).to(tl.float32)
    at_target = _to_logits(at_target, inner, outer, CAPPED)[0]

    # In each lane, of the logits seen so far: the highest, the sum of exp(logit - highest), and the sum of
    # (logit - highest) * exp(logit - highest).
    highest = tl.full([LANES], _NOTHING, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, columns, DEEP * LANES):
        at = start + tile
        # the mask is the width of the buffer, which is even where the vocabulary is not: reads stay wide
        row = tl.load(products + at, mask=at < columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
        logits = _to_logits(row, inner, outer, CAPPED)[0]
        logits = tl.where(at < entries, logits, _NOTHING)
        peak = tl.maximum(highest, tl.max(logits, axis=0))
        below = logits - peak[None, :]
        parts = tl.exp(below)
        fall = highest - peak
        shrink = tl.exp(fall)
        if ENTROPY:
            moment = (moment + fall * total) * shrink + tl.sum(below * parts, axis=0)
        total = total * shrink + tl.sum(parts, axis=0)
        highest = peak

    # These reductions also hold back every write below until all lanes have read.
    top = tl.max(highest, axis=0)
    weight = tl.exp(highest - top)
    sum_of_row = tl.sum(total * weight, axis=0)
    log_sum = tl.log(sum_of_row)
    log_total = top + log_sum
    tl.store(log_totals + place, log_total)
    tl.store(logprobs + place, at_target - top - log_sum)
    if ENTROPY:
        mean = tl.sum((moment + total * (highest - top)) * weight, axis=0) / sum_of_row
        tl.store(entropies + place, log_sum - mean)
    if GRADIENT:
        _put_row_gradient(
            products, target, log_total, -1.0, 0.0, 0.0, columns, entries, inner, outer, CAPPED, False, BLOCK
        )


@triton.jit
def _gradient_kernel(
    products,
    stride,
    targets,
    log_totals,
    pulls,
    entropies,
    entropy_pulls,
    columns,
    entries,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    products += place.to(tl.int64) * stride
    target = tl.load(targets + place)
    log_total = tl.load(log_totals + place)
    pull = tl.load(pulls + place)
    entropy, entropy_pull = 0.0, 0.0
    if ENTROPY:
        entropy = tl.load(entropies + place)
        entropy_pull = tl.load(entropy_pulls + place)
    _put_row_gradient(
        products, target, log_total, pull, entropy, entropy_pull, columns, entries, inner, outer, CAPPED, ENTROPY, BLOCK
    )


@triton.jit
def _scaled_rows_kernel(source, factors, index, out, width, INDEXED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    value = tl.load(source + row * width + at, mask=here).to(tl.float32) * tl.load(factors + row)
    if INDEXED:
        row = tl.load(index + row)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _scale_kernel(source, factor, out, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if IN_PLACE and by == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    value = tl.load(source + at, mask=here).to(tl.float32) * by
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)
