"""The document sets of the packing benchmark, as token stores, and what is counted of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_lib.data.mixture import Mixer, Part
from posttrain_lib.data.order import epoch_permutation
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.streams import StoreStream
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.schema.examples import TokenizedExample

SEED = 0
#: ids of generated documents: they are copied, never looked up
VOCABULARY = 32768
#: no document has fewer tokens
SHORTEST = 8
#: documents of a padded batch, for the fill that padding would give
PADDED_BATCH = 8


@dataclass(frozen=True)
class LengthSet:
    """Document lengths by a law. ``draw`` takes (generator, documents); results are rounded and clipped to ``cap``."""

    name: str
    law: str
    cap: int
    draw: Callable[[np.random.Generator, int], np.ndarray]

    def lengths(self, documents: int) -> np.ndarray:
        """int32 [documents], always the same."""
        drawn = self.draw(np.random.default_rng(SEED), documents)
        return np.clip(np.rint(drawn), SHORTEST, self.cap).astype(np.int32)


#: Chosen so that 50,000 documents have the means and the fills, padded to the longest of all and of a batch of eight,
#: that the figures in the field were taken with: 487, 0.119 and 0.333; 551, 0.067 and 0.218.
LOG_NORMAL = LengthSet(
    "log-normal", "exp(normal(5.704, 1.0))", 4096, lambda random, count: random.lognormal(5.704, 1.0, count)
)
HEAVY_TAILED = LengthSet(
    "heavy-tailed",
    "Pareto, exponent 0.87, from 73.3",
    8192,
    lambda random, count: 73.3 * (1.0 + random.pareto(0.87, count)),
)


def statistics_of(lengths: np.ndarray, cap: int) -> dict[str, Any]:
    """What a padded trainer would make of these lengths."""
    whole = lengths[: len(lengths) // PADDED_BATCH * PADDED_BATCH].reshape(-1, PADDED_BATCH)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "mean": round(float(lengths.mean()), 1),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "fill_padded_to_cap": round(float(lengths.mean() / cap), 4),
        "fill_padded_in_batches_of_8": round(float(whole.sum() / (whole.max(axis=1).sum() * PADDED_BATCH)), 4),
    }


def generated_store(folder: Path, lengths: np.ndarray) -> TokenStore:
    """Documents of random ids; every second token is trained on."""
    tokens = np.random.default_rng(SEED).integers(0, VOCABULARY, 1 << 20, dtype=np.int32)
    weights = (np.arange(1 << 20) % 2).astype(np.float32)
    begins = np.random.default_rng(SEED + 1).integers(0, len(tokens) - int(lengths.max()), len(lengths))

    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
            yield tokens[begin : begin + length], weights[begin : begin + length]

    return written_store(folder, documents())


def written_store(folder: Path, documents: Iterator[tuple[np.ndarray, np.ndarray]]) -> TokenStore:
    """A store of (token ids, loss weights)."""
    with TokenStoreWriter(folder) as writer:
        for number, (tokens, weights) in enumerate(documents):
            writer.add(TokenizedExample(tokens, weights, "set", f"rows:{number}"))
    return TokenStore(folder)


def chat_documents(data: Path) -> tuple[list[np.ndarray], list[str]]:
    """Every conversation of the real files through Qwen3's template, once: (token ids int32, source of each)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen3")
    documents, sources = [], []
    for name in ("chat", "tool_chat"):
        with open(data / "chat" / f"{name}.jsonl", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
                documents.append(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32))
                sources.append(row.get("source", name))
    return documents, sources


class LengthsFeed:
    """What the planner needs of a feed, from lengths alone: one epoch in StoreFeed's order of the same seed."""

    def __init__(self, lengths: np.ndarray) -> None:
        stream = StoreStream(partial(epoch_permutation, len(lengths), SEED), lengths, limit=len(lengths))
        self.mixer = Mixer([Part(stream, ((1, 1.0),), "stop")], by="samples")


def systematic_sample(lengths: np.ndarray, every: int) -> np.ndarray:
    """Numbers of one document in ``every``, by length: the middle of each stratum, so that the law stays the same."""
    return np.sort(np.argsort(lengths, kind="stable")[every // 2 :: every])


def order_of(feed: StoreFeed | LengthsFeed) -> np.ndarray:
    """int64: the units in the order in which the packer gets them; uses the feed up."""
    parts = []
    while len(ids := feed.mixer.peek(1)[0]):
        parts.append(ids.copy())
        feed.mixer.advance(len(ids))
    return np.concatenate(parts)


def delays(order: np.ndarray, rows: Sequence[Sequence[int]], taken: np.ndarray) -> np.ndarray:
    """int64 [units]: rows that were made between a unit's being taken in and its own; 0: it left with the first.

    Args:
        order: the units as they come. rows: units of each row. taken: int64 [rows], units taken in before each.
    """
    row_out = np.empty(len(order), np.int64)
    row_out[np.concatenate([np.asarray(row, np.int64) for row in rows])] = np.repeat(
        np.arange(len(rows)), [len(row) for row in rows]
    )
    return row_out[order] - np.searchsorted(taken, np.arange(len(order)), side="right")


def checksums(store: TokenStore) -> np.ndarray:
    """int64 [N]: sum of the token ids of each document, by which it is known again after packing."""
    found = np.empty(len(store), np.int64)
    for chosen, shard, numbers in store.shards_of(np.arange(len(store))):
        found[chosen] = np.add.reduceat(shard.tokens, shard.offsets[:-1], dtype=np.int64)[numbers]
    return found
