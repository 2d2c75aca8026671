"""A family's reading of one config.json as plain data, and back.

What comes out of a proposal is this data and nothing else. It is taken apart by the types of the dataclasses: a value
of another type, an unknown field or a size beyond reason is refused, and no code travels with it.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain_lib.errors import ModelError
from posttrain_lib.models import spec as spec_module
from posttrain_lib.models.spec import DecoderConfig, Sharding
from posttrain_lib.models.weights import Rule

_CLASS = "class"  # no field can be called that
# Far above any model, far below what makes a process or an integer overflow.
_LARGEST_INTEGER, _LARGEST_LIST, _LONGEST_TEXT = 2**40, 4096, 512


@dataclasses.dataclass(frozen=True)
class FamilyData:
    """What a proposal says of one config.json: the decoder, and how its weights are stored and cut."""

    config: DecoderConfig
    rules: tuple[Rule, ...]
    sharding_plan: Mapping[str, Sharding]
    left_alone: str | None = None


def to_data(value: Any) -> Any:
    """JSON-ready form: a dataclass is an object with its class's name under ``class``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_CLASS: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(item) for item in value]
    return value


def family_data(data: Any) -> FamilyData:
    """Inverse of :func:`to_data`.

    Raises:
        ModelError: naming the place that is not what the types say.
    """
    found: FamilyData = _value(data, FamilyData, "proposal")
    return found


def _value(value: Any, kind: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is Literal:
        return _checked(value, any(value == item and type(value) is type(item) for item in arguments), kind, where)
    if origin is tuple:
        _checked(value, isinstance(value, list) and len(value) <= _LARGEST_LIST, kind, where)
        return tuple(_value(item, arguments[0], f"{where}[{number}]") for number, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        _checked(value, isinstance(value, dict) and len(value) <= _LARGEST_LIST, kind, where)
        pairs = value.items()
        return {_value(key, arguments[0], where): _value(item, arguments[1], f"{where}.{key}") for key, item in pairs}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(value, kind, where)
    if kind is type(None):
        return _checked(value, value is None, kind, where)
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(_checked(value, fits, kind, where))
    if kind is int:
        return _checked(value, type(value) is int and abs(value) <= _LARGEST_INTEGER, kind, where)
    if kind is str:
        return _checked(value, isinstance(value, str) and len(value) <= _LONGEST_TEXT, kind, where)
    return _checked(value, type(value) is kind, kind, where)


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """A union: dataclasses are told apart by their class, the rest by type."""
    if isinstance(value, dict):
        named = [kind for kind in kinds if getattr(kind, "__name__", None) == value.get(_CLASS)]
        _checked(value.get(_CLASS), bool(named), " | ".join(str(kind) for kind in kinds), where)
        return _value(value, named[0], where)
    for kind in kinds:
        try:
            return _value(value, kind, where)
        except ModelError:
            continue
    return _checked(value, False, " | ".join(str(kind) for kind in kinds), where)


def _dataclass(value: Any, kind: type, where: str) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    fits = isinstance(value, dict) and value.get(_CLASS) == kind.__name__ and set(value) == names | {_CLASS}
    _checked(value, fits, f"{kind.__name__} with {', '.join(sorted(names))}", where)
    hints = get_type_hints(kind, {**vars(spec_module), "Rule": Rule})
    return kind(**{name: _value(value[name], hints[name], f"{where}.{name}") for name in names})


def _checked(value: Any, fits: bool, expected: Any, where: str) -> Any:
    if not fits:
        raise ModelError(
            "a proposal's definition is not plain data of the right types",
            where=where,
            got=f"{type(value).__name__} {str(value)[:120]}",
            expected=getattr(expected, "__name__", expected),
            fix="build it of the dataclasses in posttrain_lib.models.spec and posttrain_lib.models.weights",
        )
    return value
