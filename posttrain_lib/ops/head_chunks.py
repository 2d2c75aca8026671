"""The output head in chunks: what every operation of the head shares.

The positions that count are picked out first. A *chunk* of them goes through one logits buffer [C, V] in the dtype of
the products. A *block* is some rows of a chunk, a bound on temporary tensors: soft caps, softmax and the gradient in
the logits are computed block by block, in float32 at least, and the gradient takes the logits' place in the buffer,
where the next products read it.

Products run in autocast's dtype where it is on, else in that of the inputs. Where torch has no kernel for half
precision on this CPU (see :func:`product_dtype`) they run in float32.

On a GPU the kernels of ``ops.head_triton`` take a whole chunk's rows where a loss has them, and torch the rest. Passes
over the weight's gradient [V, D], beyond the write that a bare product ends with:

* One chunk: none. Its product writes the gradient in the weight's own dtype, from sums in float32, and a factor of 1
  from outside costs no pass (another, a read and a write).
* More: a sum in float32. Each chunk but the first reads and writes it in its product, 8 bytes per entry, most of them
  while the product computes; the backward reads it once to write the gradient, 6 bytes.

In time, those 6 bytes against the products' ``6 * N`` operations per entry are ``R / N``, where R is how many
operations the device does while its memory moves a byte: with R = 250, 3 % at 8192 rows and 1.5 % at 16384.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain_lib.ops.fused import has_kernels
from posttrain_lib.ops.output_head import OutputHead

# Rows per chunk: enough for the products to run at full rate. The byte bound, on a chunk as if in float32, keeps large
# vocabularies in check: on a CPU it means 441 rows at 152k entries, on a GPU 4096 up to 163k and 1.25 GiB in bfloat16.
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096
_CHUNK_BYTES = {"cpu": 256 << 20}
_CHUNK_BYTES_ELSEWHERE = 5 << 29
_LEAST_ROWS = 64
# Chunks of one size are a multiple of this: what matrix products are tiled by.
_EVEN_ROWS = 128
# Bytes of a block; it bounds what a loss allocates beside the chunk. Blocks of a CPU's cache size were not faster, and
# on a busy machine took more of its time: every small pass waits for all threads.
_BLOCK_BYTES = {"cpu": 64 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20
# Rows of a half-precision weight that are widened at a time on a CPU: 16 MiB at 512 columns.
_TILE_BYTES = 16 << 20


def product_dtype(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """The dtype that the head's products run in.

    float32 instead of half precision on a CPU for which oneDNN has no kernel of that precision: torch falls back to a
    plain loop there. ``tests/benchmarks/head.py`` records how much that takes.
    """
    device = hidden_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
    if device == "cpu" and not cpu_has_products_in(dtype):
        return torch.float32
    return dtype


def cpu_has_products_in(dtype: torch.dtype) -> bool:
    """Whether matrix products of this dtype run at full rate on this machine's CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class ChunkedHead:
    """A head over chunks of the rows of ``hidden_TD`` at ``index_N``.

    Args:
        head: the head. hidden_TD: [T, D]. index_N: int64 [N], distinct.
        chunk_tokens: rows per chunk; None: by device and vocabulary, in chunks of about one size.
        temperature: divides the logits, after everything else.
        dtype: of the products; None: :func:`product_dtype`. A backward, which runs outside the forward's autocast,
            passes the forward's.
        buffers: heads that hold a logits buffer at the same time; they share the bytes of a chunk.
        weight_gradient: whether the weight's gradient will be formed beside the buffer.

    ``kernels`` says whether the kernels of ``ops.head_triton`` do the passes over a chunk's rows.
    """

    @torch.no_grad()
    def __init__(
        self,
        head: OutputHead,
        hidden_TD: Tensor,
        index_N: Tensor,
        *,
        chunk_tokens: int | None = None,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
        buffers: int = 1,
        weight_gradient: bool = False,
    ) -> None:
        self.head = head
        self.dtype = product_dtype(hidden_TD, head.weight_VD) if dtype is None else dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.device = hidden_TD.device
        self.group = None if head.shard is None else head.shard.group
        self.rows_ND = hidden_TD.index_select(0, index_N).to(self.dtype)
        self.count = index_N.shape[0]
        self.temperature = temperature
        # Ranks that share a vocabulary exchange maxima and sums in between.
        self.kernels = has_kernels(self.device.type) and self.group is None and self.wide == torch.float32
        self.chunk_tokens = chunk_tokens
        self.chunk_rows = chunk_tokens or self._default_rows(buffers, weight_gradient)
        self.down = None if head.adapter is None else head.adapter.down_RD.to(self.dtype)
        self.up = None if head.adapter is None else head.adapter.up_VR.to(self.dtype)
        self._buffer: Tensor | None = None
        self._tile: Tensor | None = None
        self._weight = head.weight_VD
        if self.device.type != "cpu":
            self._weight = self._weight.to(self.dtype)

    def _default_rows(self, buffers: int, weight_gradient: bool) -> int:
        kind, (entries, size) = self.device.type, self.head.weight_VD.shape
        rows = _CHUNK_ROWS.get(kind, _CHUNK_ROWS_ELSEWHERE)
        bytes_of_chunk = _CHUNK_BYTES.get(kind, _CHUNK_BYTES_ELSEWHERE) // buffers
        rows = max(_LEAST_ROWS, min(rows, bytes_of_chunk // (4 * entries)))
        if weight_gradient and buffers == 1 and self.writes_weight_dtype:
            # The sum in float32 that one chunk does without is room for more rows of the buffer.
            rows_in_one = rows + size * (self.wide.itemsize - self.dtype.itemsize) // self.dtype.itemsize
            if self.count <= rows_in_one:
                return rows_in_one
        chunks = max(1, math.ceil(self.count / rows))
        return min(rows, _EVEN_ROWS * math.ceil(self.count / chunks / _EVEN_ROWS)) or rows

    @property
    def writes_weight_dtype(self) -> bool:
        """Whether one product may write the weight's gradient in the weight's dtype, summed in float32 all the same."""
        return self.kernels and self.dtype == self.head.weight_VD.dtype

    def chunks(self) -> Iterator[slice]:
        """Slices of the N rows."""
        return (
            slice(start, min(start + self.chunk_rows, self.count)) for start in range(0, self.count, self.chunk_rows)
        )

    def blocks(self, chunk: slice) -> Iterator[slice]:
        """Slices of the N rows that make up a chunk; the whole chunk where ranks must talk about each."""
        size = chunk.stop - chunk.start
        if self.group is None:
            entry = self.wide.itemsize * self.head.weight_VD.shape[0]
            size = max(1, _BLOCK_BYTES.get(self.device.type, _BLOCK_BYTES_ELSEWHERE) // entry)
        return (slice(start, min(start + size, chunk.stop)) for start in range(chunk.start, chunk.stop, size))

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the products' dtype, by runs of rows; a widened tile is overwritten by the next."""
        entries, size = self._weight.shape
        if self._weight.dtype == self.dtype:
            yield slice(0, entries), self._weight
            return
        rows = max(1, _TILE_BYTES // (self.dtype.itemsize * size))
        if self._tile is None:
            self._tile = torch.empty((min(rows, entries), size), dtype=self.dtype, device=self.device)
        for start in range(0, entries, rows):
            here = slice(start, min(start + rows, entries))
            yield here, self._tile[: here.stop - start].copy_(self._weight[here])

    def products(self, chunk: slice) -> Tensor:
        """[C, rows of the weight]: the bare products of a chunk, padding included. Overwritten by the next call."""
        rows = self.rows_ND[chunk]
        if self._buffer is None:
            shape = (rows.shape[0], self._weight.shape[0])
            self._buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        out = self._buffer[: rows.shape[0]]
        for here, weight in self.weight_tiles():
            torch.mm(rows, weight.t(), out=out[:, here])
        if self.head.adapter is not None:
            assert self.down is not None and self.up is not None
            out.addmm_(torch.mm(rows, self.down.t()), self.up.t(), alpha=self.head.adapter.scale)
        return out

    def logits(self, products_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits [B, entries that exist] of a block of products, and what soft caps multiply their gradient with.

        In place where the products are as wide as the sums. A constant factor on the gradient is :attr:`slope`.
        """
        logits = products_BV[:, : self.head.local_vocab_size].to(self.wide)
        (inner, outer), steepness = self.curve, None
        if inner is not None:
            logits.mul_(inner).tanh_()
            steepness = 1 - logits.square()
        if outer != 1.0:
            logits.mul_(outer)
        return logits, steepness

    @property
    def curve(self) -> tuple[float | None, float]:
        """(inner, outer) factors between products and logits: ``outer * tanh(inner * x)``, without tanh for None."""
        if self.head.softcap is None:
            return None, self.slope
        return self.head.scale / self.head.softcap, self.head.softcap / self.temperature

    @property
    def slope(self) -> float:
        """The constant factor between the products and the logits (near 0, where there is a soft cap)."""
        return self.head.scale / self.temperature

    def put_gradient(self, products_BV: Tensor, grad_logits_BV: Tensor, steepness: Tensor | None) -> None:
        """Put the gradient in a block's logits where its products were; the factor :attr:`slope` is left out."""
        if steepness is not None:
            grad_logits_BV.mul_(steepness)
        entries = self.head.local_vocab_size
        if products_BV.dtype != self.wide:
            products_BV[:, :entries].copy_(grad_logits_BV)
        if entries < products_BV.shape[1]:
            products_BV[:, entries:] = 0

    def highest(self, values: Tensor) -> Tensor:
        """The greatest over the ranks of the group, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks of the group, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(columns on this rank, which of the ids lie on it); None for the second where all do."""
        if self.group is None:
            return ids, None
        columns = ids - self.head.first
        here = (columns >= 0) & (columns < self.head.local_vocab_size)
        return columns.where(here, 0), here

    def logits_at(self, logits_BV: Tensor, ids_BK: Tensor) -> Tensor:
        """[B, K] logits of int64 ids [B, K] of the whole vocabulary, from whichever rank has them."""
        columns, here = self.local_ids(ids_BK)
        found = logits_BV.gather(1, columns)
        if here is not None:
            found = self.highest(found.where(here, -math.inf))
        return found

    def add_at(self, grad_BV: Tensor, ids_BK: Tensor, values_BK: Tensor) -> None:
        """Add to the gradient at distinct ids of the whole vocabulary, those that lie on this rank."""
        columns, here = self.local_ids(ids_BK)
        grad_BV.scatter_add_(1, columns, values_BK if here is None else values_BK.where(here, 0))

    def exponentials_(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Turn logits into ``exp(logits - highest)`` in place; returns (highest, this rank's sum), [B, 1] each."""
        highest = self.highest(logits_BV.amax(dim=-1, keepdim=True))
        return highest, logits_BV.sub_(highest).exp_().sum(dim=-1, keepdim=True)

    def softmax_(self, logits_BV: Tensor) -> Tensor:
        """Turn logits into probabilities in place, over all ranks; returns the log-sum-exp [B, 1]."""
        highest, total = self.exponentials_(logits_BV)
        total = self.total(total)
        logits_BV.div_(total)
        return highest + total.log()

    def log_softmax_(self, logits_BV: Tensor) -> Tensor:
        """Turn logits into log-probabilities in place, over all ranks, and return them."""
        highest, total = self.exponentials_(logits_BV.clone())
        return logits_BV.sub_(highest + self.total(total).log())


class HeadGradients:
    """Sums of the gradients of hidden rows, weight and adapter over the chunks of a head; None where not wanted.

    Args:
        chunked: the head.
        factors_N1: [N, 1] in the sums' dtype, or one number: the gradient in the products is ``factors * grad`` of what
            :meth:`add` gets. They go into the narrow side of each product.
        hidden, weight, down, up: whether each of them needs a gradient.

    The sums are float32 at least, but for a weight's that a single product writes (see
    :attr:`ChunkedHead.writes_weight_dtype`). ``rows_ND`` [N, D] still lacks the factors: :func:`spread_rows`.
    """

    def __init__(
        self, chunked: ChunkedHead, factors_N1: Tensor | float, hidden: bool, weight: bool, down: bool, up: bool
    ) -> None:
        self.chunked = chunked
        self.factors_N1 = factors_N1
        self.rows_ND = self._empty(chunked.rows_ND) if hidden else None
        # The first chunk writes it whole; without any chunk it stays zero.
        fill = self._empty if chunked.count else self._zeros
        in_one = chunked.writes_weight_dtype and chunked.count <= chunked.chunk_rows
        self.weight_VD = fill(chunked.head.weight_VD, chunked.dtype if in_one else None) if weight else None
        self.down_RD = self._zeros(chunked.down) if down and chunked.down is not None else None
        self.up_VR = self._zeros(chunked.up) if up and chunked.up is not None else None

    def _empty(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(like, dtype=dtype or self.chunked.wide, memory_format=torch.contiguous_format)

    def _zeros(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros_like(like, dtype=dtype or self.chunked.wide, memory_format=torch.contiguous_format)

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """Add a chunk's part. grad_CV: [C, rows of the weight] in the products' dtype, 0 at the padding."""
        chunked, rows = self.chunked, self.chunked.rows_ND[chunk]
        factors = self.factors_N1[chunk] if isinstance(self.factors_N1, Tensor) else self.factors_N1
        scaled = scaled_rows(rows, factors, torch.empty_like(rows))
        if self.rows_ND is not None:
            part = self.rows_ND[chunk]
            for here, weight in chunked.weight_tiles():
                _add_product_(part, grad_CV[:, here], weight, first=here.start == 0)
        if self.weight_VD is not None:
            _add_product_(self.weight_VD, grad_CV.t(), scaled, first=chunk.start == 0)
        if chunked.head.adapter is not None:
            self._add_adapter(chunk, grad_CV, scaled)

    def _add_adapter(self, chunk: slice, grad_CV: Tensor, scaled: Tensor) -> None:
        chunked, adapter = self.chunked, self.chunked.head.adapter
        assert adapter is not None and chunked.up is not None and chunked.down is not None
        if self.rows_ND is not None or self.down_RD is not None:
            pulled = torch.mm(grad_CV, chunked.up).mul_(adapter.scale)
            if self.rows_ND is not None:
                _add_product_(self.rows_ND[chunk], pulled, chunked.down)
            if self.down_RD is not None:
                _add_product_(self.down_RD, pulled.t(), scaled)
        if self.up_VR is not None:
            low = torch.mm(scaled, chunked.down.t()).mul_(adapter.scale)
            _add_product_(self.up_VR, grad_CV.t(), low)

    def reduce(self) -> None:
        """Sum over the ranks what they share: the hidden rows' and ``down_RD``'s gradient."""
        for shared in (self.rows_ND, self.down_RD):
            if shared is not None:
                self.chunked.total(shared)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """total += left @ right, summed in the dtype of ``total``; ``first``: total holds nothing yet."""
    if left.dtype == total.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif total.is_cuda:
        # A GPU puts half-precision products into float32 without rounding them in between.
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(left, right)
        total.copy_(product) if first else total.add_(product)


def scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * total`` in the dtype asked for; may overwrite ``total``. The host does not wait for the factor."""
    if has_kernels(total.device.type) and total.dtype != torch.float64:
        from posttrain_lib.ops import head_triton

        return head_triton.scaled(total, factor, dtype)
    return total.mul_(factor).to(dtype)


def spread_rows(
    grad_ND: Tensor, factors: Tensor | float, index_N: Tensor, like: tuple[torch.Size, torch.dtype]
) -> Tensor:
    """[T, D] with ``factors * grad`` at ``index_N`` and zeros elsewhere, in the dtype asked for.

    ``factors``: [N, 1], or one number, in the dtype of ``grad_ND``.
    """
    shape, dtype = like
    spread = torch.zeros(shape, dtype=dtype, device=grad_ND.device)
    if isinstance(factors, Tensor) and _has_row_kernel(grad_ND, dtype):
        from posttrain_lib.ops.head_triton import put_scaled_rows

        return put_scaled_rows(grad_ND, factors.reshape(-1), spread, index_N)
    return spread.index_copy_(0, index_N, scaled_rows(grad_ND, factors, torch.empty_like(grad_ND, dtype=dtype)))


def scaled_rows(rows_ND: Tensor, factors: Tensor | float, out: Tensor) -> Tensor:
    """``factors * rows`` in ``out``, rounded once; ``factors``: [N, 1], or one number.

    There is a kernel because torch takes several times as long where it mixes dtypes.
    """
    if isinstance(factors, Tensor) and _has_row_kernel(rows_ND, out.dtype):
        from posttrain_lib.ops.head_triton import put_scaled_rows

        return put_scaled_rows(rows_ND, factors.reshape(-1), out)
    return torch.mul(rows_ND, factors, out=out)


def _has_row_kernel(rows_ND: Tensor, dtype: torch.dtype) -> bool:
    return has_kernels(rows_ND.device.type) and torch.float64 not in (rows_ND.dtype, dtype) and rows_ND.is_contiguous()
