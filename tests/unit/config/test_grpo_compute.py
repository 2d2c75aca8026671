"""Where recipe grpo runs: on several devices, and not where it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.run import RunConfig
from posttrain_lib.errors import ConfigError


def config_of(**sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "recipe": "grpo",
        "name": "test",
        "data": {"sources": [{"name": "a", "path": "rows.jsonl", "format": "prompts"}], "max_example_tokens": 64},
        "model": {"path": "model"},
        "train": {"steps": 10, "row_tokens": 512},
        "grpo": {"rewards": [{"name": "exact"}]},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return build_run_config(raw)


@pytest.mark.parametrize(
    "compute", [{"devices_per_node": 2}, {"devices_per_node": 3}, {"nodes": 2, "address": "head:6379"}], ids=str
)
def test_several_devices_need_nothing_else(compute: dict[str, Any]) -> None:
    # three devices do not divide train.rows_per_step, which means nothing to this recipe
    config = config_of(compute=compute)
    assert config.compute.mesh_spec().world == config.compute.workers > 1


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ({"launcher": "torchrun"}, "driven from one process"),
        ({"address": "ray://head:10001"}, "which a client cannot"),
        ({"devices_per_node": 2, "min_devices": 1}, "compute.min_devices"),
        ({"devices_per_node": 2, "mesh": {"context": 2}}, "needs whole documents"),
    ],
    ids=str,
)
def test_where_it_cannot_run_is_said(compute: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(compute=compute)
