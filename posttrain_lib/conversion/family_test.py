"""A tiny case of an architecture, out of the config.json of a real one, and the test file that goes with a proposal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families.fields import HARMLESS

#: sizes of every tiny case, here and in the tests of the families that the project has
TINY_SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: pattern of a field with a whole number -> what it is at most in a tiny case
_AT_MOST = (
    (r"head_dim$", 16),
    (r"(^|_)window(_size)?$", 9),
    (r"experts_per_tok|top_k", 2),
    (r"experts$", 6),
    (r"intermediate_size$", 24),
    (r"first_k_dense|max_window_layers", 2),
    (r"^original_max_position_embeddings$", 32),
    (r"lora_rank$", 16),
)


def tiny_case(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tiny model with everything on that a config.json has on; sizes are ``TINY_SIZES``."""
    layers = config.get("num_hidden_layers", 0)
    case: dict[str, Any] = {"model_type": config["model_type"]}
    for name, value in config.items():
        if name not in HARMLESS and name not in TINY_SIZES and value is not None:
            case[name] = _small(name, value, layers)
    if config.get("num_key_value_heads") == config.get("num_attention_heads"):
        case["num_key_value_heads"] = TINY_SIZES["num_attention_heads"]
    return case


def _small(name: str, value: Any, layers: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _small(key, item, layers) for key, item in value.items()}
    if isinstance(value, list) and len(value) == layers > TINY_SIZES["num_hidden_layers"]:
        return _some_of_each(value, TINY_SIZES["num_hidden_layers"])
    if isinstance(value, list) and all(type(item) is int for item in value):
        return [item for item in value if item < max(TINY_SIZES["num_hidden_layers"], len(value))]
    if type(value) is int:
        return next((min(value, most) for pattern, most in _AT_MOST if re.search(pattern, name)), value)
    return value


def _some_of_each(values: list[Any], count: int) -> list[Any]:
    """The first ``count``, the last of them being kinds that would else be missing."""
    first = values[:count]
    missing = [value for value in dict.fromkeys(map(str, values)) if value not in map(str, first)]
    rest = [next(value for value in values if str(value) == name) for name in missing]
    return [*first[: count - len(rest)], *rest][:count]


def test_text(model_type: str, case: Mapping[str, Any]) -> str:
    """Source of the proposal's test."""
    fields = "\n".join(f"    {name!r}: {value!r}," for name, value in case.items()).replace("'", '"')
    return f'''"""The family ``{model_type}`` on a tiny model with all on that the model had on that it was found for.

On adoption FAMILIES gets the line ``"{model_type}": "posttrain_lib.models.families.{model_type}:FAMILY"`` and
tests/support/tiny_models.CASES the case below: the tests of every family then go through it, and this file can go.
"""

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.checkpoint.verify import verify_model
from posttrain_lib.models.families import FAMILIES
from tests.support.tiny_models import CASES, write_tiny_model

CASE: dict[str, Any] = {{
{fields}
}}


def test_the_gate_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "{model_type}", "posttrain_lib.models.families.{model_type}:FAMILY")
    monkeypatch.setitem(CASES, "{model_type}", CASE)
    report = verify_model(write_tiny_model("{model_type}", tmp_path))
    assert report.passed, [check for check in report.checks if not check.passed]
'''
