"""Context parallelism: ranks that share the tokens of one packed batch, for rows longer than one device holds.

Every rank has the same batch from the loader and cuts its own part out of it before the forward: equally many tokens,
in chunks dealt out so that the query-key pairs are even. For one document as long as the row that is an early and a
late chunk for each rank, the zigzag of ring attention (Brandon et al. 2023; Zhu 2024); for many documents it goes by
where their pairs are.

A part is a packed batch like any other: its segments are pieces of documents, and ``prefixes`` says which keys each one
continues, as it does for documents that share their beginning. All but attention works on the rank's own tokens. In
attention the keys and values that lie elsewhere are exchanged (:mod:`posttrain_lib.ops.attention_exchange`), and the
loss is a sum over own tokens. So the model is the same object with or without; what a rank has to know stands in its
batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.balance import deal_out, imbalance
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.ops.attention_exchange import KeyExchange
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.shared_prefix import SharedPrefixes

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import DecoderConfig
    from posttrain_lib.parallel.mesh import RankMesh

#: chunks of a rank: more of them even out what fewer cannot, and cut more documents
_CHUNKS = (2, 4, 8)
#: largest over mean of the ranks' pairs that needs no finer cut: what a rank waits for is less than this of attention
_EVEN = 1.05


def check_context(config: DecoderConfig, degree: int, *, row_tokens: int, longest: int) -> None:
    """Refuse what cannot be cut over ``degree`` ranks; knows no process group, for plans and the start of a run.

    Args:
        row_tokens: length of a packed row. longest: tokens of the longest document.

    Raises:
        ConfigError: saying which field to set.
    """
    if degree == 1:
        return
    _check_layers(config, degree)
    if row_tokens % (2 * degree):
        raise ConfigError(
            "a packed row cannot be cut into two equal chunks for each context rank",
            where="train.row_tokens",
            got=row_tokens,
            expected=f"a multiple of 2 x compute.mesh.context = {2 * degree}",
            fix=f"set train.row_tokens: {-(-row_tokens // (2 * degree)) * 2 * degree}",
        )
    if config.changes_rope(1, longest):
        bound = min(config.rope_bounds)
        raise ConfigError(
            "a document's tokens cannot lie over ranks where a rotary embedding goes by the document's length",
            where="compute.mesh.context",
            got=f"{degree}, and documents of up to {longest} tokens",
            expected=f"1, or no document above {bound} tokens (longrope's original_max_position_embeddings)",
            fix=f"set compute.mesh.context: 1, or data.max_example_tokens: {bound}",
        )


def apply_context_parallel(model: Decoder, mesh: RankMesh) -> None:
    """Make sure that the model can run on parts of a row. Nothing of it changes: parts carry what attention needs.

    Raises:
        ConfigError: a layer carries a state from token to token. (A class of transformers runs in one rank, see
            ``models.hf_spec``.)
    """
    _check_layers(model.config, mesh.spec.context)


def _check_layers(config: DecoderConfig, degree: int) -> None:
    if config.is_recurrent:
        raise ConfigError(
            "linear attention carries a state from token to token, which cannot lie over ranks",
            where="compute.mesh.context",
            got=degree,
            expected=1,
            fix="set compute.mesh.context: 1, and shard, tensor or full recomputation for memory",
        )


def own_part(batch: PackedBatch, mesh: RankMesh) -> PackedBatch:
    """This rank's part of a batch of numpy arrays that all ranks of its context group have; the batch itself where a
    row lies on one rank."""
    if mesh.spec.context == 1:
        return batch
    return cut_batch(batch, mesh.spec.context, mesh.context_rank, mesh.context.get_group())


def cut_batch(batch: PackedBatch, degree: int, rank: int, group: Any = None) -> PackedBatch:
    """Part ``rank`` of ``degree`` of a batch of numpy arrays.

    Its tokens keep their order, targets, weights and positions; its segments are the runs of one segment's tokens that
    it has, with that one's source and id. The parts together are the batch.

    Raises:
        DataError: T is no multiple of ``2 * degree``.
    """
    parts = [_Part.of(batch, runs) for runs in _deal(batch, degree)]
    own = parts[rank]
    needs = [part.marked_keys(batch.num_tokens) for part in parts]
    owned = [part.tokens for part in parts]
    others = [other for other in range(degree) if other != rank]
    sent = {other: np.flatnonzero(needs[other][own.tokens]) for other in others}
    received = {other: owned[other][needs[rank][owned[other]]] for other in others}
    exchange = KeyExchange(
        send_index=np.concatenate(list(sent.values())),
        sent=tuple(len(sent.get(other, ())) for other in range(degree)),
        received=tuple(len(received.get(other, ())) for other in range(degree)),
        travels=any(int(need.sum()) > int(need[tokens].sum()) for need, tokens in zip(needs, owned, strict=True)),
        group=group,
    )
    place = np.full(batch.num_tokens, -1, np.int64)
    here = np.concatenate([own.tokens, *received.values()])
    place[here] = np.arange(len(here))
    return _cut(batch, own, place[own.keys], exchange)


@dataclass(frozen=True)
class _Part:
    """The pieces of segments that one rank has, in order, and where on the whole batch's axis their keys lie.

    ``segments``, ``lengths``, ``contexts`` int64 [n]: of which segment, own tokens, keys before them. ``tokens`` int64
    [own T], ``keys`` int64 [U], piece after piece.
    """

    segments: np.ndarray
    lengths: np.ndarray
    contexts: np.ndarray
    tokens: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, batch: PackedBatch, runs: np.ndarray) -> _Part:
        """``runs`` int64 [runs, 2]: where this rank's tokens begin and end, in order."""
        bounds = batch.cu_seqlens.astype(np.int64)
        cuts = [np.concatenate([[begin], bounds[(bounds > begin) & (bounds < end)], [end]]) for begin, end in runs]
        starts, stops = (np.concatenate([cut[part] for cut in cuts]) for part in (slice(-1), slice(1, None)))
        segments, lengths = np.searchsorted(bounds, starts, side="right") - 1, stops - starts
        # A token's place in its document is how many keys lie before it. Padding sees no further than its own piece.
        real = batch.document_ids[segments] >= 0
        contexts = np.where(real, batch.positions[starts], 0).astype(np.int64)
        if batch.prefixes is None:
            firsts, paths = bounds[segments], None
        else:
            firsts, paths = batch.prefixes.cu_seqlens_k[segments].astype(np.int64), batch.prefixes.key_index
        firsts = firsts + np.where(real, 0, starts - bounds[segments])
        places = _ranges(firsts, contexts + lengths)
        return cls(segments, lengths, contexts, _ranges(starts, lengths), places if paths is None else paths[places])

    def marked_keys(self, tokens: int) -> np.ndarray:
        """bool [tokens]: of which keys this part sees any."""
        marked = np.zeros(tokens, bool)
        marked[self.keys] = True
        return marked


def _cut(batch: PackedBatch, own: _Part, key_index: np.ndarray, exchange: KeyExchange) -> PackedBatch:
    tokens, longest = own.tokens, own.contexts + own.lengths
    ids, weights = batch.document_ids[own.segments], batch.loss_weights[own.tokens]
    return PackedBatch(
        token_ids=batch.token_ids[tokens],
        target_ids=batch.target_ids[tokens],
        loss_weights=weights,
        positions=batch.positions[tokens],
        cu_seqlens=np.append(0, own.lengths.cumsum()).astype(np.int32),
        supervised_index=np.flatnonzero(weights).astype(batch.supervised_index.dtype),
        document_sources=batch.document_sources[own.segments],
        document_ids=ids,
        max_seqlen=int(own.lengths.max()),
        real_tokens=int(own.lengths[ids >= 0].sum()),
        prefixes=SharedPrefixes(
            lengths=tuple(own.lengths.tolist()),
            contexts=tuple(own.contexts.tolist()),
            key_index=key_index,
            cu_seqlens_k=np.append(0, longest.cumsum()).astype(np.int32),
            max_path=int(longest.max()),
            exchange=exchange,
        ),
    )


def _deal(batch: PackedBatch, degree: int) -> list[np.ndarray]:
    """Each rank's runs of tokens, int64 [runs, 2], neighbouring chunks joined; the same on every rank."""
    total = batch.num_tokens
    if total % (2 * degree):
        raise DataError(
            "a packed batch cannot be cut into two equal chunks for each context rank",
            where="a packed batch",
            got=f"{total} tokens",
            expected=f"a multiple of 2 x {degree} context ranks",
            fix="train.row_tokens has to be a multiple of 2 x compute.mesh.context",
        )
    pairs = batch.positions.astype(np.float64) + 1  # keys that each token sees
    best: tuple[float, int, list[list[int]]] | None = None
    for each in _CHUNKS:
        if total % (each * degree):
            break
        costs = pairs.reshape(each * degree, -1).sum(1)
        dealt = deal_out(costs, degree)
        uneven = imbalance(costs, dealt)
        if best is None or uneven < best[0]:
            best = uneven, total // (each * degree), dealt
        if uneven <= _EVEN:
            break
    assert best is not None, "the first count of chunks divides"
    return [_runs(np.sort(chunks), best[1]) for chunks in best[2]]


def _runs(chunks: np.ndarray, size: int) -> np.ndarray:
    """int64 [runs, 2] of ascending numbers of chunks."""
    breaks = np.flatnonzero(np.diff(chunks) > 1) + 1
    return np.array([[part[0], part[-1] + 1] for part in np.split(chunks, breaks)], np.int64) * size


def _ranges(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: ``firsts[i], firsts[i] + 1, ...``, ``lengths[i]`` of them, end to end."""
    ends = lengths.cumsum()
    return np.arange(ends[-1], dtype=np.int64) + np.repeat(firsts - (ends - lengths), lengths)
