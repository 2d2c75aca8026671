"""Imbalance between simulated ranks: the loader's rows dealt out as it does, beside a plain deal."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain_lib.data.balance import deal_out, imbalance
from posttrain_lib.data.planner import Planner
from posttrain_lib.data.store_feed import StoreFeed

RANKS = 8
#: more steps say nothing new
MOST_STEPS = 200
ROWS_EACH = (8, 16)


def rank_imbalance(
    feed: StoreFeed, *, row_tokens: int, packing_buffer: int, pair_cost: float, rows_each: int
) -> dict[str, Any]:
    """Largest over mean of the ranks' cost, mean and maximum over full steps, for two models of cost.

    ``least``: what no deal of equally many rows can go below, the dearest row among the cheapest, the largest of all
    steps. ``modelled``: what the loader deals by, a token's products and attention together. ``attention``: the pairs
    alone.
    The feed must have no end.
    """
    planner = Planner(feed, row_tokens=row_tokens, packing_buffer=packing_buffer)
    pairs = feed.units.pairs
    count = RANKS * rows_each
    steps = min(MOST_STEPS, max(20, int(feed.units.lengths.sum(dtype=np.int64)) // (count * row_tokens)))
    found: dict[str, list[tuple[float, float]]] = {"modelled": [], "attention": []}
    least = {"modelled": 1.0, "attention": 1.0}
    plain = [list(range(rank, count, RANKS)) for rank in range(RANKS)]
    for step in range(steps):
        rows = planner.rows(count, step + 1)
        of_row = np.array([pairs[list(row)].sum() for row in rows])
        for name, costs in (("modelled", row_tokens + pair_cost * of_row), ("attention", of_row)):
            alone = (costs.max() + np.sort(costs)[: rows_each - 1].sum()) * RANKS / costs.sum()
            least[name] = max(least[name], float(alone))
            found[name].append((imbalance(costs, deal_out(costs, RANKS)), imbalance(costs, plain)))
    result: dict[str, Any] = {"ranks": RANKS, "rows_per_rank": rows_each, "steps": steps}
    for name, values in found.items():
        dealt, round_robin = np.array(values).T
        result[name] = {
            "least": round(least[name], 5),
            "dealt": {"mean": round(float(dealt.mean()), 5), "max": round(float(dealt.max()), 5)},
            "round_robin": {"mean": round(float(round_robin.mean()), 5), "max": round(float(round_robin.max()), 5)},
        }
    return result
