"""Launching without Ray: device and threads, and the same iterator."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from posttrain_lib.compute.launch import launch, threads_per_worker
from posttrain_lib.compute.processes import SESSION_FILE, remove_orphans, started_at
from posttrain_lib.compute.ray_session import check_reachable
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


def test_a_process_id_that_came_round_again_is_left_alone(tmp_path: Path) -> None:
    own = os.getpid()
    assert remove_orphans(tmp_path) == []
    record = {"driver": [own, 1], "processes": [[own, 1]], "folder": str(tmp_path / "gone")}
    (tmp_path / SESSION_FILE).write_text(json.dumps(record))
    assert started_at(own) != 1
    assert remove_orphans(tmp_path) == []
    assert not (tmp_path / SESSION_FILE).exists()
