"""The pool of processes that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.rank_pool import RankPool


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    """A module's own, so that no process outlives its tests: it would share two cores with all that come later."""
    pool = RankPool(4)
    yield pool
    pool.close()
