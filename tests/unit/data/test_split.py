"""The held-out split depends on a row's group alone."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.config.data import DataConfig, HeldOut
from posttrain_lib.data.encoding import RawRow, RowEncoder
from posttrain_lib.data.split import fraction_up_to, is_held_out, split_place


def test_the_share_is_about_the_fraction() -> None:
    held = sum(is_held_out(f"group {number}", HeldOut(fraction=0.1)) for number in range(20_000))
    # 4.9 standard deviations of a binomial: sqrt(20000 * 0.1 * 0.9) = 42
    assert abs(held - 2_000) < 206


def test_another_seed_holds_out_other_groups_and_a_larger_share_holds_out_more() -> None:
    groups = [str(number) for number in range(2_000)]
    chosen = {fraction: {g for g in groups if is_held_out(g, HeldOut(fraction=fraction))} for fraction in (0.1, 0.2)}
    assert chosen[0.1] < chosen[0.2]
    assert chosen[0.1] != {g for g in groups if is_held_out(g, HeldOut(fraction=0.1, seed=1))}


@given(place=st.integers(0, 2**64 - 1))
def test_the_least_fraction_that_holds_out_a_place(place: int) -> None:
    fraction = fraction_up_to(place)
    assert place < fraction * 2**64
    # A float64 has 53 bits: what it adds is of no account beside the distance of two of a billion groups.
    assert fraction * 2**64 - place <= max(1, place) * 2**-51


def test_it_holds_out_the_first_group_alone() -> None:
    groups = [f"group:{number}" for number in range(20)]
    first = min(groups, key=lambda group: split_place(group, HeldOut()))
    wider = HeldOut().model_copy(update={"fraction": fraction_up_to(split_place(first, HeldOut()))})
    assert [group for group in groups if is_held_out(group, wider)] == [first]


TEXTS: list[dict[str, Any]] = [{"text": f"Text {number}."} for number in range(60)]
TOKENS: list[dict[str, Any]] = [{"token_ids": [5, number, 7]} for number in range(60)]


@pytest.mark.parametrize(("format_name", "rows"), [("text", TEXTS), ("tokens", TOKENS)])
def test_a_row_without_turns_is_held_out_by_its_content(
    chatml_folder: Path, format_name: str, rows: list[dict[str, Any]]
) -> None:
    """A copy of it elsewhere is on the same side, whatever its file is called and wherever it stands there."""
    source = {"name": "s", "path": "rows.jsonl", "format": format_name}
    config = DataConfig.model_validate({"sources": [source], "held_out": {"fraction": 0.2}})
    encoder = RowEncoder(config, chatml_folder, inspect=False)

    def sides(file: str, rows: list[dict[str, Any]]) -> list[bool]:
        raw = [RawRow(0, 0, number, f"{file}:{number + 1}", row) for number, row in enumerate(rows)]
        return [row.held_out for row in encoder.encode(raw)[0]]

    found = sides("rows.jsonl", rows)
    assert any(found) and not all(found)
    assert sides("renamed.jsonl", [*rows[::-1], *rows]) == [*found[::-1], *found]
