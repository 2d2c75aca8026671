"""Launching without Ray: device and threads, and the same iterator."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from posttrain_lib.compute.launch import launch, launcher_of, threads_per_worker
from posttrain_lib.compute.processes import SESSION_FILE, remove_orphans, started_at
from posttrain_lib.compute.ray_session import check_reachable, resolved
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.errors import ConfigError
from tests.oracles.tiny_job import make_job, tiny_config


def test_in_process_yields_reports_and_returns_the_result(tmp_path: Path) -> None:
    events = launch(make_job(tmp_path, tiny_config(steps=2)), ComputeConfig(launcher="in_process", device="cpu"))
    steps = []
    while True:
        try:
            steps.append(next(events).step)
        except StopIteration as end:
            result = end.value
            break
    assert steps == [0, 1, 2]
    assert dataclasses.asdict(result)["step"] == 2


def test_auto_takes_the_least_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_of(ComputeConfig()) == "in_process"
    assert launcher_of(ComputeConfig(devices_per_node=2)) == "ray"
    assert launcher_of(ComputeConfig(address="head:6379")) == "ray"
    assert launcher_of(ComputeConfig(launcher="ray")) == "ray"
    torchrun = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in torchrun:
        assert launcher_of(ComputeConfig(devices_per_node=2)) == "ray", "some of its variables are other launchers' too"
        monkeypatch.setenv(name, "1")
    assert launcher_of(ComputeConfig(devices_per_node=2)) == "torchrun"
    assert launcher_of(ComputeConfig(launcher="in_process")) == "in_process"


def test_several_nodes_need_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several nodes need a Ray cluster"):
        next(launch(make_job(tmp_path, tiny_config()), ComputeConfig(nodes=2)))


def test_torchrun_has_to_have_started_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not started by torchrun"):
        next(launch(make_job(tmp_path, tiny_config()), ComputeConfig(launcher="torchrun")))


def test_a_floor_above_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="min_devices"):
        ComputeConfig(devices_per_node=2, min_devices=3)


def test_threads() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_worker(ComputeConfig()) == cores
    assert threads_per_worker(ComputeConfig(devices_per_node=4 * cores)) == 1
    assert threads_per_worker(ComputeConfig(devices_per_node=2, threads_per_worker=7)) == 7


def test_an_address_nobody_listens_at() -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        check_reachable("127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        check_reachable("not an address")
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        check_reachable("ray://127.0.0.1:1")


def test_auto_address_is_the_surrounding_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS is not set"):
        resolved("auto")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert resolved("auto") == "head:6379"
    assert resolved("other:1") == "other:1"


def test_a_process_id_that_came_round_again_is_left_alone(tmp_path: Path) -> None:
    own = os.getpid()
    assert remove_orphans(tmp_path) == []
    record = {"driver": [own, 1], "processes": [[own, 1]], "folder": str(tmp_path / "gone")}
    (tmp_path / SESSION_FILE).write_text(json.dumps(record))
    assert started_at(own) != 1
    assert remove_orphans(tmp_path) == []
    assert not (tmp_path / SESSION_FILE).exists()
