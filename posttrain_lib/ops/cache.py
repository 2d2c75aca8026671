"""Cached generation: what attention and recurrences keep of the tokens before, for some sequences at once.

One forward of new tokens, all layers, then ``advance``: until then the new tokens stand behind the kept ones without
being counted, so that every layer of a forward finds the same lengths.

    cache = KeyValueCache(sequences=2, capacity=64)
    model(...prompts packed, DocumentLayout.of(..., cache=cache)...); cache.advance([5, 9])
    model(...one token each...); cache.advance([1, 1])

Sequences may come and go between forwards: ``join`` copies some out of another cache, ``remove`` lets some leave.

Keys lie as [n, K, capacity, H]: those of one head are contiguous, so that the products of a decoding step over all
sequences and heads run on the storage itself. A layer with a window keeps all its keys and reads the window's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain_lib.ops.attention import DocumentLayout, KeySegments, attend, attention_dtype, has_arithmetic
from posttrain_lib.ops.attention_pieces import scores_softmax


class KeyValueCache:
    """Keys, values and recurrent states of n sequences, each with room for ``capacity`` tokens. No gradients.

    ``lengths`` int64 [n] on the host: tokens kept of each sequence, so the position of its next one. Storage is
    allocated per layer at its first ``append`` or ``join``, with that one's heads, widths, dtype and device; it has
    room for ``rows`` sequences, of which the first n are in use (default: as many as there are).
    """

    def __init__(self, sequences: int, capacity: int, rows: int | None = None) -> None:
        self.capacity = capacity
        self.rows = sequences if rows is None else rows
        self.lengths = torch.zeros(sequences, dtype=torch.int64)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}
        self._step: _Step | None = None

    @property
    def sequences(self) -> int:
        """How many there are, n."""
        return len(self.lengths)

    def append(self, layer: int, key_TKH: Tensor, value_TKV: Tensor, layout: DocumentLayout) -> None:
        """Write segment i's new tokens behind those kept of sequence i.

        Raises:
            ValueError: another number of segments than sequences, or more tokens than there is room for.
            RuntimeError: the tensors want a gradient.
        """
        if torch.is_grad_enabled() and (key_TKH.requires_grad or value_TKV.requires_grad):
            raise RuntimeError("a cache keeps no gradients: run cached generation under torch.no_grad()")
        step = self._step_of(layout)
        for stored, rows in ((self._keys, key_TKH), (self._values, value_TKV)):
            if layer not in stored:
                shape = (self.rows, rows.shape[1], self.capacity, rows.shape[2])
                # zeros: a masked place has weight 0, and 0 times whatever memory held may be NaN
                stored[layer] = rows.new_zeros(shape, dtype=attention_dtype(rows))
            kept = stored[layer][: self.sequences]
            if step.single:
                kept[torch.arange(self.sequences, device=kept.device), :, step.places] = rows.to(kept.dtype)
                continue
            for own, new, start in zip(kept, rows.split(step.counts), step.before, strict=True):
                own[:, start : start + len(new)] = new.transpose(0, 1)

    def attend(
        self,
        layer: int,
        query_TNH: Tensor,
        layout: DocumentLayout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """[T, N, V]: causal attention of the new tokens, ``append``-ed before, over all of their sequences.

        Arguments as ``ops.attention.packed_attention``. One new token of each sequence is one batched masked product;
        anything else goes through the packed kernels, over keys laid end to end.
        """
        query = query_TNH.to(attention_dtype(query_TNH))
        step = self._step_of(layout)
        if step.single:
            return self._attend_single(layer, query, step, scale, window, softcap, sinks_N)
        key, value = (
            torch.cat([own[:, :end].transpose(0, 1) for own, end in zip(kept[layer], step.after, strict=False)])
            for kept in (self._keys, self._values)  # rows that are not in use lie behind the others
        )
        keys = step.segments
        return attend(query, key, value, layout, keys, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)

    def _attend_single(
        self,
        layer: int,
        query_nNH: Tensor,
        step: _Step,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks_N: Tensor | None,
    ) -> Tensor:
        """One new token of each sequence. Query heads that share a key head are rows of one product."""
        begin, end, seen = step.view(window)
        key, value = (kept[layer][: self.sequences, :, begin:end] for kept in (self._keys, self._values))
        query = query_nNH.unflatten(1, (key.shape[1], -1))
        if softcap is None and sinks_N is None:
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).flatten(1, 2)
        sinks = None if sinks_N is None else sinks_N.view(*query.shape[1:3], 1)
        hidden = None if seen is None else ~seen
        dtype = query.dtype
        if not has_arithmetic(query.device, dtype):
            query, key, value = query.float(), key.float(), value.float()
        probabilities, _ = scores_softmax(torch.matmul(query, key.mT), scale, softcap, hidden, sinks)
        return torch.matmul(probabilities[..., : end - begin].to(value.dtype), value).flatten(1, 2).to(dtype)

    def advance(self, counts: Sequence[int]) -> None:
        """Count the new tokens of each sequence, once all layers have seen them.

        Raises:
            ValueError: not one count per sequence, or more tokens than there is room for.
        """
        self._check(counts)
        self.lengths = self.lengths + torch.tensor(counts, dtype=torch.int64)
        self._step = None

    def drop(self, keep: Sequence[int]) -> None:
        """Keep these sequences alone, in their order; finished ones leave.

        Raises:
            ValueError: not strictly increasing numbers of sequences.
        """
        if any(one >= other for one, other in pairwise(keep)):
            raise ValueError(f"sequences to keep must be in order and named once, got {list(keep)}")
        self.reorder(keep)

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what ``order[i]`` was; one may be named several times (beams) or never.

        Raises:
            ValueError: a number that no sequence has.
        """
        if any(not 0 <= old < self.sequences for old in order):
            raise ValueError(f"there are {self.sequences} sequences, numbered from 0, got {list(order)}")
        index = torch.tensor(order, dtype=torch.int64)
        self.lengths = self.lengths[index]
        self.rows = self.sequences
        self._step = None
        for stored in (self._keys, self._values):
            for layer, kept in stored.items():  # a layer at a time: the old one is freed before the next is copied
                stored[layer] = kept.index_select(0, index.to(kept.device))
        for layer, tensors in self._states.items():
            self._states[layer] = tuple(tensor.index_select(0, index.to(tensor.device)) for tensor in tensors)

    def join(self, other: KeyValueCache, numbers: Sequence[int]) -> None:
        """Copies of these sequences of ``other`` come behind the own ones; one may be named several times.

        Raises:
            ValueError: more sequences than there are rows, or a sequence longer than ``capacity``.
        """
        index = torch.tensor(numbers, dtype=torch.int64)
        first, lengths = self.sequences, other.lengths[index]
        longest = int(lengths.max())
        if first + len(numbers) > self.rows or longest > self.capacity:
            raise ValueError(
                f"{first} of {self.rows} rows are in use, of room for {self.capacity} tokens each: "
                f"{len(numbers)} sequences of up to {longest} tokens do not fit"
            )
        for stored, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, kept in theirs.items():
                if layer not in stored:
                    stored[layer] = kept.new_zeros((self.rows, kept.shape[1], self.capacity, kept.shape[3]))
                own = stored[layer][first : first + len(numbers)]
                own[:, :, :longest] = kept[:, :, :longest].index_select(0, index.to(kept.device))
                own[:, :, longest:] = 0  # whoever had the row before may have left NaN
        for layer, tensors in other._states.items():
            copies = tuple(tensor.index_select(0, index.to(tensor.device)) for tensor in tensors)
            before = self._states.get(layer)
            self._states[layer] = copies if before is None else tuple(map(torch.cat, zip(before, copies, strict=True)))
        self.lengths = torch.cat([self.lengths, lengths])
        self._step = None

    def remove(self, numbers: Sequence[int]) -> list[int]:
        """These sequences leave, and the last ones take their places, so that few rows are copied.

        Returns:
            for each sequence that is left the number that it had.

        Raises:
            ValueError: a number that no sequence has, or one that is named twice.
        """
        gone = set(numbers)
        if len(gone) < len(numbers) or not gone <= set(range(self.sequences)):
            raise ValueError(f"there are {self.sequences} sequences, numbered from 0 and named once, got {numbers}")
        left = self.sequences - len(gone)
        movers = (old for old in range(left, self.sequences) if old not in gone)
        order = [new if new not in gone else next(movers) for new in range(left)]
        for stored in (self._keys, self._values):
            for kept in stored.values():
                for new, old in enumerate(order):
                    if new != old:
                        kept[new] = kept[old]
        index = torch.tensor(order, dtype=torch.int64)
        for layer, tensors in self._states.items():
            self._states[layer] = tuple(tensor.index_select(0, index.to(tensor.device)) for tensor in tensors)
        self.lengths = self.lengths[index]
        self._step = None
        return order

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens of each sequence, where there is less."""
        if capacity <= self.capacity:
            return
        for stored in (self._keys, self._values):
            for layer, kept in stored.items():  # a layer at a time: the old one is freed before the next is copied
                wider = kept.new_zeros((self.rows, kept.shape[1], capacity, kept.shape[3]))
                wider[: self.sequences, :, : self.capacity] = kept[: self.sequences]
                stored[layer] = wider
        self.capacity = capacity
        self._step = None

    def forget(self, sequences: Sequence[int]) -> None:
        """These sequences begin anew: their next tokens are their first ones."""
        index = torch.tensor(sequences, dtype=torch.int64)
        self.lengths = self.lengths.index_fill(0, index, 0)
        self._step = None
        for layer, tensors in self._states.items():  # a state before the first token is zero
            self._states[layer] = tuple(tensor.index_fill(0, index.to(tensor.device), 0) for tensor in tensors)

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        """What a recurrent layer left, [n, ...] each; None before its first forward."""
        return self._states.get(layer)

    def set_state(self, layer: int, tensors: Sequence[Tensor]) -> None:
        """Keep a recurrent layer's state after the new tokens; ``drop`` and ``reorder`` go along.

        Raises:
            ValueError: a tensor whose first dimension is not the number of sequences.
        """
        for tensor in tensors:
            if tensor.shape[:1] != (self.sequences,):
                raise ValueError(f"state of {self.sequences} sequences expected, got shape {tuple(tensor.shape)}")
        self._states[layer] = tuple(tensor.detach() for tensor in tensors)

    def _check(self, counts: Sequence[int]) -> None:
        """One count for each sequence, and room for all."""
        if len(counts) != self.sequences:
            raise ValueError(f"{self.sequences} sequences are kept, got new tokens of {len(counts)}")
        for number, (count, kept) in enumerate(zip(counts, self.lengths.tolist(), strict=True)):
            if count < 0 or kept + count > self.capacity:
                raise ValueError(
                    f"sequence {number} has {kept} tokens and room for {self.capacity}, got {count} more: make the "
                    "cache with a larger capacity"
                )

    def _step_of(self, layout: DocumentLayout) -> _Step:
        """What all layers of this forward share."""
        if self._step is None or self._step.layout is not layout:
            counts = layout.host_lengths()
            self._check(counts)
            self._step = _Step(layout, counts, tuple(self.lengths.tolist()))
        return self._step


@dataclass
class _Step:
    """One forward's new tokens, as every layer needs them; made once."""

    layout: DocumentLayout
    counts: tuple[int, ...]
    before: tuple[int, ...]
    _views: dict[int | None, tuple[int, int, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.layout.cu_seqlens.device
        self.after = tuple(kept + new for kept, new in zip(self.before, self.counts, strict=True))
        self.single = all(count == 1 for count in self.counts)
        self.places = torch.tensor(self.before, device=device)
        ends = torch.tensor([0, *self.after]).cumsum(0).to(torch.int32)
        self.segments = KeySegments(ends.to(device), self.after, max(self.after))

    def view(self, window: int | None) -> tuple[int, int, Tensor | None]:
        """(begin, end, seen bool [n, 1, 1, end - begin]) of the places that single new tokens see; None: all of them
        see all, as sequences of one length do."""
        if window not in self._views:
            shortest, longest = min(self.after), max(self.after)
            begin = 0 if window is None else max(0, shortest - window)
            seen = None
            if shortest != longest:
                place = torch.arange(begin, longest, device=self.places.device)
                distance = self.places[:, None] - place
                seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
                seen = seen[:, None, None]
            self._views[window] = begin, longest, seen
        return self._views[window]
