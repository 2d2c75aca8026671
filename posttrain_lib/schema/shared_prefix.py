"""Where a packed segment that continues another one finds the tokens before it.

A packed row is cut into *segments*. A root is a whole document. A segment with a parent is the rest of a document
whose first tokens lie elsewhere in the row: it continues the *path* of its parent, which is the parent's own context
followed by the parent's tokens, after the path's first ``d`` tokens. So documents with a common beginning (completions
of one prompt, the two answers of a preference pair, a conversation whose earlier turns are rewritten) hold it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.errors import DataError


@dataclass(frozen=True)
class SharedPrefixes:
    """What attention needs of the segments' paths, as numbers of the host and as arrays for the device.

    n segments; a segment's *keys* are its context followed by its own tokens, U is the sum of their counts:
        lengths       own tokens of each segment, n Python numbers
        contexts      tokens of its document before it, n Python numbers; 0 for a root
        key_index     int64 [U]   where each segment's keys lie on the packed axis, segment after segment
        cu_seqlens_k  int32 [n+1] boundaries of the segments in ``key_index``
        max_path      largest number of keys of a segment: the longest document, counted from its start
        exchange      where ranks share the row's tokens: which keys come from other ranks (see
                      ``ops.attention_exchange.KeyExchange``); those have places behind this rank's own. Else None

    The arrays are numpy as made by the loader and tensors in a batch of tensors. Everything that a path decides is
    worked out here, once and on the host: the model reads nothing back from a device.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    key_index: Any
    cu_seqlens_k: Any
    max_path: int
    exchange: Any = None

    @classmethod
    def of(cls, cu_seqlens: Any, positions: Any, parents: Any) -> SharedPrefixes:
        """The paths of a packed row or batch of rows.

        Args:
            cu_seqlens: int32 [n+1] segment boundaries. positions: int64 [T]; a segment's first is its context's length.
            parents: int32 [n], the segment whose path each one continues, always an earlier one; -1 for a root.

        Raises:
            DataError: a parent that is not earlier, a path shorter than the context, a root that does not start at 0.
        """
        bounds, places, owners = (np.asarray(values) for values in (cu_seqlens, positions, parents))
        lengths, contexts = np.diff(bounds).astype(np.int64), places[bounds[:-1]].astype(np.int64)
        _check(owners, lengths, contexts)
        ends = np.cumsum(contexts + lengths)
        begins = ends - contexts - lengths
        row = np.arange(bounds[-1], dtype=np.int64)
        key_index = np.empty(ends[-1], np.int64)
        for parent, start, length, begin, context in zip(
            *(values.tolist() for values in (owners, bounds[:-1], lengths, begins, contexts)), strict=True
        ):
            if context:
                key_index[begin : begin + context] = key_index[begins[parent] : begins[parent] + context]
            key_index[begin + context : begin + context + length] = row[start : start + length]
        return cls(
            lengths=tuple(lengths.tolist()),
            contexts=tuple(contexts.tolist()),
            key_index=key_index,
            cu_seqlens_k=np.append(0, ends).astype(np.int32),
            max_path=int((contexts + lengths).max()),
        )

    def map(self, convert: Callable[[Any], Any]) -> SharedPrefixes:
        """The same with ``convert`` applied to the arrays (numpy -> torch, device moves)."""
        index, boundaries = convert(self.key_index), convert(self.cu_seqlens_k)
        exchange = None if self.exchange is None else self.exchange.map(convert)
        return SharedPrefixes(self.lengths, self.contexts, index, boundaries, self.max_path, exchange)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys of each segment: its context and itself."""
        return tuple(context + own for context, own in zip(self.contexts, self.lengths, strict=True))

    @property
    def shares(self) -> bool:
        """Whether any segment has a context, on any of the ranks that share the row's tokens; if none has, the row is
        one of whole documents."""
        return any(self.contexts) or (self.exchange is not None and self.exchange.travels)


def _check(parents: np.ndarray, lengths: np.ndarray, contexts: np.ndarray) -> None:
    """Every segment's context is the beginning of an earlier segment's path."""
    earlier = (parents < np.arange(len(parents))) & (parents >= -1)
    known = earlier & (parents >= 0)
    paths = np.where(known, (contexts + lengths)[np.where(known, parents, 0)], 0)
    wrong = np.flatnonzero(~earlier | (contexts < 0) | (contexts > paths))
    if not len(wrong):
        return
    segment, parent = int(wrong[0]), int(parents[wrong[0]])
    found = f"a path of {paths[segment]} tokens of segment {parent}" if parent >= 0 else "no parent"
    raise DataError(
        "a packed segment does not continue the document that it is said to",
        where=f"segment {segment} of a packed batch",
        got=f"first position {contexts[segment]} and {found}" if earlier[segment] else f"parent {parent}",
        expected="an earlier segment, whose path has as many tokens, or -1 and first position 0",
        fix="this is a fault of the packer: parents and positions must come from the same plan",
    )
