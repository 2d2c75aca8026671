"""The peers of the packing benchmark: TRL's offline packing and grain's streaming first fit.

TRL is of the project's environment, for tests; grain is pinned in infra/locks/peers.txt, which says how to install it
into a folder of its own. Nothing of it goes before the project's own packages: the folder comes last on the path.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from posttrain_lib.data.token_store import TokenStore

NAMES = ("trl", "grain")


def find_peers(folder: Path | None) -> dict[str, str | None]:
    """Version of each peer that can be imported, None of the others; ``folder`` joins the path."""
    if folder is not None:
        sys.path.append(str(folder))
    found: dict[str, str | None] = dict.fromkeys(NAMES)
    with contextlib.suppress(ImportError):
        import trl.data_utils  # noqa: F401

        found["trl"] = importlib.metadata.version("trl")
    with contextlib.suppress(ImportError):
        import grain.experimental  # noqa: F401

        found["grain"] = importlib.metadata.version("grain")
    return found


def arrow_dataset(store: TokenStore) -> Any:
    """The store as a ``datasets.Dataset`` in memory with the columns that TRL's trainer packs: token ids int32, and
    the mask of trained tokens int8."""
    from datasets import Dataset

    ids, masks = [], []
    for _, shard, _ in store.shards_of(np.arange(len(store))):
        offsets = pa.array(shard.offsets)
        ids.append(pa.ListArray.from_arrays(offsets, pa.array(shard.tokens)))
        masks.append(pa.ListArray.from_arrays(offsets, pa.array((shard.weights != 0).astype(np.int8))))
    return Dataset(pa.table({"input_ids": pa.chunked_array(ids), "assistant_masks": pa.chunked_array(masks)}))


def trl_pack(dataset: Any, row_tokens: int, batch_size: int) -> Any:
    """``trl.pack_dataset(..., "bfd")``, kept in memory."""
    from trl.data_utils import pack_dataset

    settings = {"batch_size": batch_size, "keep_in_memory": True, "load_from_cache_file": False}
    return pack_dataset(dataset, row_tokens, "bfd", map_kwargs=settings)


def check_trl(packed: Any, lengths: np.ndarray, sums: np.ndarray, row_tokens: int) -> float:
    """The fill; the run fails where a document is missing, cut, or not itself any more."""
    table = packed.data.combine_chunks()
    rows, ids = table.num_rows, table.column("input_ids").combine_chunks()
    of_document = table.column("seq_lengths").combine_chunks().flatten().to_numpy().astype(np.int64)
    missing, cut = len(lengths) - len(of_document), int(lengths.sum(dtype=np.int64) - of_document.sum())
    if missing or cut:
        raise SystemExit(f"packing: TRL dropped {missing} documents and {cut} tokens; no comparison is possible")
    flat = ids.flatten().to_numpy()
    found = np.add.reduceat(flat, np.cumsum(of_document) - of_document, dtype=np.int64)
    if not np.array_equal(np.sort(found), np.sort(sums)):
        raise SystemExit("packing: TRL's documents are not those that it was given")
    return float(len(flat) / (rows * row_tokens))


class TrlCollator:
    """TRL's own way from packed rows to a trainer's tensors (padding-free), a row at a time as its default."""

    def __init__(self) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def run(self, packed: Any, most_rows: int) -> int:
        """Collate at most so many rows; the tokens in them."""
        tokens = 0
        for number in range(min(most_rows, len(packed))):
            tokens += int(self._collate([packed[number]])["input_ids"].shape[-1])
        return tokens


def grain_pack(store: TokenStore, order: np.ndarray, row_tokens: int, bins: int) -> tuple[int, int]:
    """Stream ``order``'s documents through grain's first fit into arrays: (tokens in rows, rows).

    The run fails where it drops or cuts a document.
    """
    import grain
    from grain.experimental import FirstFitPackIterDataset

    documents = [dict(zip(("tokens", "weights"), store.get(int(number)), strict=True)) for number in order]
    stream = grain.MapDataset.source(documents).to_iter_dataset()
    sizes = {"tokens": row_tokens, "weights": row_tokens}
    tokens = rows = seen = 0
    for row in FirstFitPackIterDataset(stream, length_struct=sizes, num_packing_bins=bins, shuffle_bins=False):
        segments = row["tokens_segment_ids"]
        tokens, rows, seen = tokens + int((segments > 0).sum()), rows + 1, seen + int(segments.max())
    expected = int(store.lengths[order].sum())
    if (tokens, seen) != (expected, len(order)):
        raise SystemExit(f"packing: grain dropped {len(order) - seen} documents and {expected - tokens} tokens")
    return tokens, rows
