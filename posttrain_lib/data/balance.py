"""Rows of a step dealt out to ranks so that they finish together."""

from __future__ import annotations

import numpy as np


def deal_out(costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Row numbers of each rank: equally many, of as equal a summed cost as a greedy deal finds; of several ranks, each
    one's dearest first.

    The step's rows stay the step's rows: only who computes them is decided here, so the global order stands for any
    number of ranks. Longest processing time first (Graham 1969) with a limit on the rows of a rank, then swaps between
    the dearest and the other ranks while they help. Deterministic; ties go to the earlier row and the lower rank.

    Args:
        costs: float64 [R], R a multiple of ``ranks``.
    """
    each, rest = divmod(len(costs), ranks)
    if rest:
        raise ValueError(f"{len(costs)} rows cannot be dealt out evenly to {ranks} ranks")
    if ranks == 1:
        return [list(range(len(costs)))]  # nothing to even out
    loads = np.zeros(ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for row in np.argsort(-costs, kind="stable").tolist():
        open_ranks = [rank for rank in range(ranks) if len(dealt[rank]) < each]
        rank = min(open_ranks, key=lambda r: (loads[r], r))
        dealt[rank].append(row)
        loads[rank] += costs[row]
    _swap(costs, dealt, loads)
    return [sorted(rows, key=lambda row: (-costs[row], row)) for rows in dealt]


def imbalance(costs: np.ndarray, dealt: list[list[int]]) -> float:
    """Largest over mean of the ranks' summed costs."""
    loads = np.array([costs[rows].sum() for rows in dealt])
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _swap(costs: np.ndarray, dealt: list[list[int]], loads: np.ndarray) -> None:
    """Exchange one row of the dearest rank for one of another while that lowers the larger of the two loads."""
    for _ in range(4 * len(dealt)):
        top = int(np.argmax(loads))
        best: tuple[float, int, int, int] | None = None
        for other in range(len(dealt)):
            gap = loads[top] - loads[other]
            # Moving `moved` from top to other leaves the larger of the two at loads - moved or other + moved.
            moved = costs[dealt[top]][:, None] - costs[dealt[other]][None, :]
            after = np.maximum(loads[top] - moved, loads[other] + moved)
            after[(moved <= 0) | (moved >= gap)] = np.inf
            mine, theirs = divmod(int(np.argmin(after)), after.shape[1])
            value = float(after[mine, theirs])
            if np.isfinite(value) and (best is None or value < best[0]):
                best = (value, other, mine, theirs)
        if best is None:
            return
        _, other, mine, theirs = best
        change = costs[dealt[top][mine]] - costs[dealt[other][theirs]]
        dealt[top][mine], dealt[other][theirs] = dealt[other][theirs], dealt[top][mine]
        loads[top] -= change
        loads[other] += change
