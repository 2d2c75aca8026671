"""Mixing: shares hold in every stretch of the stream, schedules move them, and exhaustion does what it says."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.data.mixture import Mixer, Part, natural_weight
from posttrain_lib.data.store_feed import MixtureSpec, SourceShare, StoreFeed
from posttrain_lib.data.streams import StoreStream
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.examples import TokenizedExample

SIZES = {"big": 120, "mid": 40, "small": 10}
LONGEST = 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    with TokenStoreWriter(folder) as writer:
        for name, size in SIZES.items():
            for row in range(size):
                length = int(rng.integers(2, 1 + (LONGEST if name == "small" else LONGEST // 3)))
                tokens = np.full(length, row, np.int32)
                writer.add(TokenizedExample(tokens, np.ones(length, np.float32), name, f"{name}:{row}"), row=(0, row))
    return TokenStore(folder)


def _feed(store: TokenStore, seed: int = 5, **fields: Any) -> StoreFeed:
    return StoreFeed(store, row_tokens=LONGEST, seed=seed, mixture=MixtureSpec(**fields))


def _draw(feed: StoreFeed, count: int, step_of: Any = lambda number: 1) -> list[int]:
    """Unit ids, as many as there are up to ``count``."""
    drawn: list[int] = []
    while len(drawn) < count:
        ids, _ = feed.mixer.peek(step_of(len(drawn)))
        if len(ids) == 0:
            break
        drawn.append(int(ids[0]))
        feed.mixer.advance(1)
    return drawn


def _names(store: TokenStore, units: list[int]) -> list[str]:
    return [store.source(unit) for unit in units]


@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.05, 10), min_size=3, max_size=3), by=st.sampled_from(["samples", "tokens"]))
def test_shares_hold_in_every_stretch(store: TokenStore, weights: list[float], by: str) -> None:
    """At every point what a source gave is within a few units of its share: no random walk."""
    shares = dict(zip(SIZES, weights, strict=True))
    feed = _feed(store, by=by, sources={name: SourceShare(weight=weight) for name, weight in shares.items()})
    units = _draw(feed, 600)
    sizes = store.lengths[units].astype(float) if by == "tokens" else np.ones(len(units))
    drawn = np.cumsum(sizes)
    for name in SIZES:
        mine = np.cumsum(sizes * np.array([source == name for source in _names(store, units)]))
        # A source is chosen while it has the most credit, so it overdraws by less than a unit; what the others
        # overdraw together is what it may lack.
        slack = (len(SIZES) - 1) * (LONGEST if by == "tokens" else 1)
        assert np.abs(mine - drawn * shares[name] / sum(weights)).max() <= slack + 1e-6


def test_a_schedule_moves_the_shares(store: TokenStore) -> None:
    mixture = {"big": SourceShare(((1, 1.0), (11, 0.0))), "mid": SourceShare(((1, 0.0), (11, 1.0)))}
    feed = _feed(store, sources={**mixture, "small": SourceShare(0.0)})
    names = _names(store, _draw(feed, 1500, step_of=lambda number: 1 + number // 100))
    found = [Counter(names[at : at + 100])["mid"] / 100 for at in range(0, 1500, 100)]
    assert np.allclose(found, [*np.linspace(0, 1, 11), 1, 1, 1, 1], atol=0.02)  # a unit more or less, of 100
    assert "small" not in names


def test_temperature_evens_the_sources_out(store: TokenStore) -> None:
    for temperature, by in [(1.0, "samples"), (4.0, "samples"), (1.0, "tokens")]:
        drawn = Counter(_names(store, _draw(_feed(store, temperature=temperature, by=by), 2000)))
        sizes = np.array([SIZES[name] for name in SIZES]) ** (1 / temperature)
        if by == "samples":
            assert np.allclose([drawn[name] / 2000 for name in SIZES], sizes / sizes.sum(), atol=0.002)
        else:  # shares of tokens in proportion to tokens: every example as often as any other
            assert np.allclose([drawn[name] / 2000 for name in SIZES], sizes / sizes.sum(), atol=0.01)
    (_, small), (_, large) = natural_weight(100, 2.0)[0], natural_weight(10_000, 2.0)[0]
    assert large / small == pytest.approx(10.0)


def test_repeating_goes_over_every_source_again_and_again(store: TokenStore) -> None:
    even = {name: SourceShare(1.0) for name in SIZES}
    units = _draw(_feed(store, sources=even), 3 * 360)
    seen = Counter(units)
    for name, size in SIZES.items():
        mine = [seen[unit] for unit in range(len(store)) if store.source(unit) == name]
        assert len(mine) == size and max(mine) - min(mine) <= 1 and abs(sum(mine) - 360) <= 2
    epochs = [unit for unit in units if store.source(unit) == "small"]
    assert epochs[:10] != epochs[10:20] and sorted(epochs[:10]) == sorted(epochs[10:20])


def test_dropping_leaves_the_rest_to_the_others(store: TokenStore) -> None:
    even = {name: SourceShare(1.0) for name in SIZES}
    units = _draw(_feed(store, sources=even, exhausted="drop"), 10_000)
    assert sorted(units) == list(range(len(store)))  # everything once, then the end
    names = _names(store, units)
    assert Counter(names[:30]) == dict.fromkeys(SIZES, 10) and "small" not in names[30:]
    assert Counter(names[30:90]) == {"big": 30, "mid": 30} and set(names[90:]) == {"big"}


def test_what_a_schedule_brings_in_later_begins_when_the_others_are_through(store: TokenStore) -> None:
    """The mixture says that it does not end; it ended where the first phase was through before its last step."""
    later = [(1, 0.0), (1000, 0.0), (1001, 1.0)]
    shares = {
        "small": SourceShare(weight=[(1, 1.0), (1000, 1.0), (1001, 0.0)], exhausted="drop"),
        "mid": SourceShare(weight=later),
        "big": SourceShare(weight=0.0),
    }
    feed = _feed(store, sources=shares)
    assert not feed.mixer.ends()
    assert _names(store, _draw(feed, 110)) == ["small"] * 10 + ["mid"] * 100


def test_stopping_ends_with_the_first_that_is_through(store: TokenStore) -> None:
    even = {name: SourceShare(1.0) for name in SIZES}
    names = _names(store, _draw(_feed(store, sources=even, exhausted="stop"), 10_000))
    assert Counter(names)["small"] == 10 and 28 <= len(names) <= 30
    kept_going = {**even, "small": SourceShare(1.0, exhausted="repeat")}
    names = _names(store, _draw(_feed(store, sources=kept_going, exhausted="stop"), 10_000))
    assert Counter(names)["mid"] == 40 and Counter(names)["small"] > 10


def test_epochs_and_caps_are_a_matter_of_each_source(store: TokenStore) -> None:
    sources = {"big": SourceShare(epochs=0.5), "mid": SourceShare(epochs=2.5), "small": SourceShare(max_examples=4)}
    units = _draw(_feed(store, sources=sources, exhausted="drop"), 10_000)
    assert Counter(_names(store, units)) == {"big": 60, "mid": 100, "small": 4}
    capped = {unit for unit in units if store.source(unit) == "small"}
    assert len(capped) == 4
    again = _draw(_feed(store, sources={"small": SourceShare(max_examples=6)}, exhausted="drop"), 10_000)
    assert capped < set(again), "a larger cap keeps what a smaller one kept"


@settings(max_examples=20)
@given(cut=st.integers(0, 200), by=st.sampled_from(["samples", "tokens"]), window=st.sampled_from([None, 7]))
def test_a_mixture_resumes_exactly(store: TokenStore, cut: int, by: str, window: int | None) -> None:
    even = {name: SourceShare(1.0) for name in SIZES}

    def feed() -> StoreFeed:
        mixture = MixtureSpec(by=by, sources={**even, "small": SourceShare(((1, 0.5), (150, 3.0)))})
        return StoreFeed(store, row_tokens=LONGEST, seed=5, mixture=mixture, window=window)

    whole, first = feed(), feed()
    taken = _draw(first, cut, step_of=lambda number: number)
    first.mixer.peek(cut)  # looked at and not taken: must not show
    state = json.loads(json.dumps(first.mixer.state()))
    resumed = feed()
    resumed.load(state, [])
    assert taken + _draw(resumed, 150, lambda n: n + cut) == _draw(whole, cut + 150, step_of=lambda number: number)


def test_other_sources_do_not_change_a_sources_order(store: TokenStore) -> None:
    even = {name: SourceShare(1.0) for name in SIZES}
    orders = []
    for weight in (0.2, 5.0):
        units = _draw(_feed(store, sources={**even, "mid": SourceShare(weight)}), 400)
        orders.append([unit for unit in units if store.source(unit) == "mid"])
    shorter = min(map(len, orders))
    assert shorter > 10 and orders[0][:shorter] == orders[1][:shorter]


def test_weights_that_leave_nothing_are_refused() -> None:
    streams = [StoreStream(lambda epoch: np.arange(3), np.ones(3, np.int32), limit=None) for _ in range(2)]
    parts = [Part(stream, ((1, 1.0), (9, 0.0)), "repeat") for stream in streams]
    with pytest.raises(ConfigError, match="no source has a weight"):
        Mixer(parts, by="samples")


def test_a_mixture_of_an_unknown_source_names_the_known(store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="a weight for big"):
        _feed(store, sources={"big": SourceShare(1.0)})
    with pytest.raises(ConfigError, match="bigg"):
        _feed(store, sources={"bigg": SourceShare(1.0)})


def test_whether_a_mixture_ends(store: TokenStore) -> None:
    def ends(**fields: Any) -> bool:
        return _feed(store, **fields).mixer.ends()

    assert not ends() and ends(exhausted="drop") and ends(exhausted="stop")
    assert ends(sources={"small": SourceShare(exhausted="stop")})
    never_drawn = {"big": SourceShare(1.0), "mid": SourceShare(1.0), "small": SourceShare(0.0, exhausted="stop")}
    assert not ends(sources=never_drawn)
    assert not StoreFeed(store, row_tokens=LONGEST).mixer.ends()
    assert StoreFeed(store, row_tokens=LONGEST, epochs=0.5).mixer.ends()
