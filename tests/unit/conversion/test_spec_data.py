"""A definition as data and back: whole, and nothing but what the types say."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.conversion.spec_data import FamilyData, family_data, to_data
from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import spec_from_config
from tests.support.tiny_models import CASES


def data_of(case: str) -> FamilyData:
    from transformers import AutoConfig

    fields = {**TINY_SIZES, **CASES[case]}
    content = AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()
    spec = spec_from_config(content | {"architectures": None})
    return FamilyData(spec.config, spec.rules, dict(spec.sharding_plan), spec.left_alone)


@pytest.mark.parametrize("case", CASES)
def test_every_family_comes_back_as_it_was(case: str) -> None:
    family = data_of(case)
    assert family_data(json.loads(json.dumps(to_data(family)))) == family


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


DATA = to_data(data_of("gpt_oss"))


@given(
    place=st.sampled_from([place for place in places(DATA) if place]),
    value=st.sampled_from([None, True, -1, 2**70, 0.5, float("nan"), "x", "x" * 600, [], [1], {}, {"class": "Path"}]),
)
def test_whatever_stands_anywhere_is_a_definition_or_refused_by_name(place: tuple[Any, ...], value: Any) -> None:
    changed = json.loads(json.dumps(DATA))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        found = family_data(changed)
    except ModelError as error:
        where = str(error.where)
    else:
        where = "proposal" if isinstance(found, FamilyData) else "something else came out"
    assert where.startswith("proposal")


def test_an_unknown_class_or_field_is_refused() -> None:
    for change in ({"class": "Path"}, {"extra": 1}):
        changed = json.loads(json.dumps(DATA))
        changed["config"] |= change
        with pytest.raises(ModelError, match="plain data"):
            family_data(changed)
    assert Path("x")  # the class named above exists, and is not made
