"""The ``compute`` section refuses what cannot be, all of it at once, with values that can."""

from __future__ import annotations

import re

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from tests.unit.config.test_load import MINIMAL


def refused(*change: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_run_config(MINIMAL, overrides=change)
    return caught.value


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (["train.rows_per_step=12", "train.micro_batch_rows=8"], "set train.micro_batch_rows: 6"),
        (["train.rows_per_step=12", "train.micro_batch_rows=8"], "set train.rows_per_step: 8 or 16"),
        (["train.rows_per_step=3", "compute.devices_per_node=8"], "set train.rows_per_step: 8"),
        (["compute.devices_per_node=8", "compute.mesh={shard: 4}"], "set compute.mesh.shard: 8"),
        (["compute.devices_per_node=8", "compute.mesh={tensor: 6}"], "{tensor: 2, context: 1, replicate: 1, shard: 4}"),
        (["compute.nodes=2", "compute.devices_per_node=4", "compute.mesh={shard: 16}"], "compute.nodes: 4"),
        (["compute.devices_per_node=3", "train.rows_per_step=1", "compute.mesh={context: 3}"], "train.row_tokens: 66"),
        (["compute.devices_per_node=8", "compute.mesh={expert: 12}"], "compute.mesh.expert: 4"),
        (["compute.offload=parameters"], "compute.devices_per_node: 2"),
        (["compute.min_devices=4"], "compute.min_devices: 1"),
        (["compute.devices_per_node=8", "compute.launcher=in_process"], "compute.launcher: ray"),
        (["train.profile={steps: [2, 11]}"], "set train.profile.steps: [2, 10]"),
    ],
)
def test_a_refusal_has_values_that_would_do(change: list[str], fix: str) -> None:
    assert fix in str(refused(*change).fix)


@pytest.mark.parametrize("rows", [7, 12, 30, 64])
@pytest.mark.parametrize("micro", [4, 5, 8])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_the_rows_that_are_named_load(rows: int, micro: int, devices: int) -> None:
    change = [f"train.rows_per_step={rows}", f"train.micro_batch_rows={micro}", f"compute.devices_per_node={devices}"]
    if rows % (micro * devices) == 0:
        return
    for name, values in re.findall(r"set train\.(\w+): ([\d]+(?: or \d+)?)", str(refused(*change).fix)):
        for value in values.split(" or "):
            build_run_config(MINIMAL, overrides=[*change, f"train.{name}={value}"])


@pytest.mark.parametrize("mesh", ["{shard: 4}", "{tensor: 6}", "{replicate: 3, tensor: 4}", "{context: 16, shard: 2}"])
def test_the_mesh_that_is_named_loads(mesh: str) -> None:
    change = ["compute.devices_per_node=8", "train.rows_per_step=8"]
    fix = str(refused(*change, f"compute.mesh={mesh}").fix)
    found = re.match(r"set (compute\.mesh(?:\.shard)?): (\{.*?\}|\d+)", fix)
    assert found is not None, fix
    build_run_config(MINIMAL, overrides=[*change, f"compute.mesh={mesh}", f"{found[1]}={found[2]}"])


def test_all_that_is_wrong_is_said_at_once_before_what_follows_from_it() -> None:
    error = refused(
        "compute.devices_per_node=2",
        "compute.launcher=in_process",
        "compute.mesh={shard: 2, expert: 3}",
        "compute.min_devices=3",
        "train.rows_per_step=3",
    )
    for said in ("runs one worker", "has to divide shard x context", "compute.min_devices (3) is above"):
        assert said in error.what, said
    for fix in ("compute.launcher: ray", "compute.mesh.expert: 1", "compute.min_devices: 2"):
        assert fix in str(error.fix), fix
    assert "rows_per_step" not in error.what, "which rows there are groups for is known when the mesh is"


def test_rows_and_tokens_are_said_together() -> None:
    error = refused("compute.devices_per_node=6", "compute.mesh={context: 3}", "train.rows_per_step=3")
    assert "train.rows_per_step (3)" in error.what and "train.row_tokens (64)" in error.what


@pytest.mark.parametrize("field", ["nodes", "devices_per_node", "mesh.shard", "retries", "device_memory_gib"])
@pytest.mark.parametrize("flag", ["true", "false"])
def test_a_flag_is_no_number(field: str, flag: str) -> None:
    error = refused(f"compute.{field}={flag}")
    assert f"compute.{field}" in error.what and "true and false are no values" in error.what
    assert error.got == flag.capitalize() and error.fix is not None


def test_a_number_from_the_environment_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODES", "4")
    assert build_run_config(MINIMAL, overrides=["compute.nodes=${NODES}"]).compute.nodes == 4


def test_a_profiled_step_is_one_of_the_run() -> None:
    error = refused("train.profile={steps: [11]}")
    assert "profile.steps has 11, and the run's last step is 10" in error.what
    build_run_config(MINIMAL, overrides=["train.profile={steps: [10]}"])
    build_run_config(MINIMAL, overrides=["train.profile={steps: [11]}", "train.steps=null", "train.epochs=1"])
