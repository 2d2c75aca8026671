"""The token store: what goes in comes out, and nothing damaged or unfinished passes for a store."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.schema.examples import TokenizedExample

EXAMPLES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=30),
        st.sampled_from(["chat", "tool", "größer"]),
        st.text(max_size=10),
    ),
    max_size=20,
)


def _example(pairs: list[tuple[int, float]], source: str = "s", row_id: str = "r") -> TokenizedExample:
    tokens, weights = zip(*pairs, strict=True)
    return TokenizedExample(np.array(tokens, np.int32), np.array(weights, np.float32), source, row_id)


def _write(folder: Path, examples: list[TokenizedExample], shard_tokens: int = 64) -> TokenStore:
    with TokenStoreWriter(folder, shard_tokens=shard_tokens) as writer:
        for example in examples:
            writer.add(example)
    return TokenStore(folder)


def _some(count: int = 40) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)
    return [
        _example(
            [(int(rng.integers(1000)), float(rng.integers(2))) for _ in range(int(rng.integers(1, 20)))],
            row_id=f"f:{i}",
        )
        for i in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(raw=EXAMPLES, shard_tokens=st.integers(1, 100))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, raw: list, shard_tokens: int) -> None:
    examples = [_example(pairs, source, row_id) for pairs, source, row_id in raw]
    store = _write(tmp_path_factory.mktemp("store"), examples, shard_tokens)
    store.verify()
    assert len(store) == len(examples)
    for index, example in enumerate(examples):
        tokens, weights = store.get(index)
        assert tokens.dtype == np.int32 and weights.dtype == np.float32
        assert np.array_equal(tokens, example.token_ids) and np.array_equal(weights, example.loss_weights)
        assert store.row_id(index) == example.row_id and store.source(index) == example.source
        # The first token is never predicted: its weight does not count.
        assert store.weight_sums[index] == example.loss_weights[1:].sum(dtype=np.float64)
        assert store.trained_counts[index] == np.count_nonzero(example.loss_weights[1:])
    assert store.lengths.tolist() == [len(example.token_ids) for example in examples]
    assert store.lengths.dtype == np.int32 and store.source_index.dtype == np.int32
    assert store.total_tokens == store.lengths.sum() and store.trained_tokens == store.trained_counts.sum()


def test_margins_are_kept_and_part_of_the_digest(tmp_path: Path) -> None:
    def store(name: str, *margins: float | None) -> TokenStore:
        with TokenStoreWriter(tmp_path / name) as writer:
            for number, margin in enumerate(margins):
                for answer in (1, 2):
                    example = _example([(number, 0.0), (answer, 1.0)])
                    writer.add(example, kind="pair", row=(0, number), margin=margin)
        return TokenStore(tmp_path / name)

    some = store("some", None, 0.1, -2.0)
    assert some.margins is not None and some.margins.dtype == np.float32
    expected = np.array([np.nan, np.nan, 0.1, 0.1, -2, -2], np.float32)
    assert np.array_equal(some.margins, expected, equal_nan=True)
    none = store("none", None, None, None)
    assert none.margins is None
    assert len({found.digest for found in (some, none, store("other", None, 0.1, -2.5))}) == 3
    assert store("again", None, 0.1, -2.0).digest == some.digest
    for wrong in (float("nan"), float("inf"), 1e39):
        with (
            pytest.raises(DataError, match="a margin that float32 does not hold"),
            TokenStoreWriter(tmp_path / f"wrong {wrong}") as writer,
        ):
            writer.add(_example([(1, 0.0), (2, 1.0)]), kind="pair", margin=wrong)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    examples = _some()
    first = _write(tmp_path / "a", examples, shard_tokens=16)
    assert first.digest == _write(tmp_path / "b", examples, shard_tokens=1000).digest
    assert first.digest != _write(tmp_path / "c", examples[:-1]).digest
    assert first.digest != _write(tmp_path / "d", [examples[1], examples[0], *examples[2:]]).digest


def test_what_is_read_cannot_be_changed(tmp_path: Path) -> None:
    store = _write(tmp_path, _some())
    with pytest.raises(ValueError, match="read-only"):
        store.get(0)[0][0] = 1


def test_an_unfinished_store_is_none(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, shard_tokens=1)
    writer.add(_some()[0])
    with pytest.raises(DataError, match="never finished"):
        TokenStore(tmp_path)
    with pytest.raises(RuntimeError), TokenStoreWriter(tmp_path) as other:
        other.add(_some()[0])
        raise RuntimeError("the preparation broke")
    with pytest.raises(DataError, match="never finished"):
        TokenStore(tmp_path)


def test_a_finished_store_is_not_written_over(tmp_path: Path) -> None:
    _write(tmp_path, _some())
    with pytest.raises(DataError, match="already"):
        TokenStoreWriter(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.arrow", "examples.arrow"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "scrambled"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    _write(tmp_path, _some())
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-40] if damage == "truncated" else bytes(len(content)))
    with pytest.raises(DataError, match=name):
        store = TokenStore(tmp_path)
        for index in range(len(store)):
            store.get(index)


def test_verify_finds_one_changed_bit(tmp_path: Path) -> None:
    store = _write(tmp_path, _some())
    tokens, _ = store.get(len(store) - 1)
    shard = sorted(tmp_path.glob("shard-*.arrow"))[-1]
    content = bytearray(shard.read_bytes())
    place = content.find(tokens.tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name) as caught:
        TokenStore(tmp_path).verify()
    assert "sha256" in str(caught.value)


@pytest.mark.parametrize("name", ["weight", "trained_tokens", "longest", "largest_id", "sources"])
def test_an_index_of_which_one_character_changed_is_damaged(tmp_path: Path, name: str) -> None:
    _write(tmp_path, _some())
    index = tmp_path / "index.json"
    text = index.read_text()
    place = re.compile(rf'"{name}": \[?\s*"?').search(text)
    assert place is not None
    other = "7" if text[place.end()] != "7" else "3"
    index.write_text(text[: place.end()] + other + text[place.end() + 1 :])
    with pytest.raises(DataError, match="index of the token store is damaged"):
        TokenStore(tmp_path)


def test_an_index_that_is_no_index(tmp_path: Path) -> None:
    _write(tmp_path, _some())
    index = tmp_path / "index.json"
    stated = json.loads(index.read_text())
    index.write_text("{broken")
    with pytest.raises(DataError, match="cannot be read"):
        TokenStore(tmp_path)
    index.write_text(json.dumps({**stated, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        TokenStore(tmp_path)
    changed = {**stated, "examples": stated["examples"] + 1}
    del changed["sha256"]
    index.write_text(json.dumps({**changed, "sha256": digest_value(changed)}))
    with pytest.raises(DataError, match="disagrees with itself"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [([], []), ([1, 2], [1.0]), ([-1], [1.0]), ([2**31], [1.0]), ([1], [float("nan")]), ([1], [-0.5])],
)
def test_a_bad_example_is_refused_by_row(tmp_path: Path, tokens: list, weights: list) -> None:
    bad = TokenizedExample(np.array(tokens, np.int64), np.array(weights, np.float32), "chat", "rows.jsonl:17")
    with pytest.raises(DataError, match=r"rows\.jsonl:17"):
        TokenStoreWriter(tmp_path).add(bad)


def test_outside_the_store_is_an_index_error(tmp_path: Path) -> None:
    store = _write(tmp_path, _some(3))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.get(index)
