"""Cached generation: what attention and recurrences keep of the tokens before, for some sequences at once.

One forward of new tokens, all layers, then ``advance``: until then the new tokens stand behind the kept ones without
being counted, so that every layer of a forward finds the same lengths.

    cache = KeyValueCache(sequences=2, capacity=64)
    model(...prompts packed, DocumentLayout.of(..., cache=cache)...); cache.advance([5, 9])
    model(...one token each...); cache.advance([1, 1])

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
    allocated per layer at its first ``append``, with that one's heads, widths, dtype and device.
    """

    def __init__(self, sequences: int, capacity: int) -> None:
        self.capacity = capacity
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
                shape = (self.sequences, rows.shape[1], self.capacity, rows.shape[2])
                # zeros: a masked place has weight 0, and 0 times whatever memory held may be NaN
                stored[layer] = rows.new_zeros(shape, dtype=attention_dtype(rows))
            kept = stored[layer]
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
            torch.cat([own[:, :end].transpose(0, 1) for own, end in zip(kept[layer], step.after, strict=True)])
            for kept in (self._keys, self._values)
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
        key, value = self._keys[layer][:, :, begin:end], self._values[layer][:, :, begin:end]
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
        self._step = None
        for stored in (self._keys, self._values):
            for layer, kept in stored.items():  # a layer at a time: the old one is freed before the next is copied
                stored[layer] = kept.index_select(0, index.to(kept.device))
        for layer, tensors in self._states.items():
            self._states[layer] = tuple(tensor.index_select(0, index.to(tensor.device)) for tensor in tensors)

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
