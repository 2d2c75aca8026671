"""A Ray cluster of several nodes on this machine: where ranks are placed, ``ray://``, and a node that goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain_lib.compute.heart import read_pulses
from posttrain_lib.parallel.process_group import free_port
from tests.distributed.test_launch_faults import lines
from tests.support.launched import ROOT, command, start, wait_for

pytestmark = pytest.mark.slow


#: a cluster lives in a process of its own: Ray reads its way of authentication once, when it is imported
PROGRAM = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80 * 2**20}
head = {"num_cpus": 0, "include_dashboard": False, "ray_client_server_port": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, head_node_args={**head, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
print("address", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
cluster.shutdown()
"""


@dataclass
class Nodes:
    """A head without devices and two nodes with one each; ``client`` is the address of the head's client server."""

    process: subprocess.Popen[str]
    address: str
    client: str

    def lose_one(self) -> None:
        """Kill a node and all that runs on it."""
        assert self.process.stdin is not None
        self.process.stdin.write("lose\n")
        self.process.stdin.flush()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # for the drivers that the tests start, too
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        words: list[str] = []
        while words[:1] != ["address"]:
            line = process.stdout.readline()
            assert line, "the cluster did not start"
            words = line.split()
        yield Nodes(process, words[1], f"ray://127.0.0.1:{port}")
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def test_one_rank_a_node_through_the_client_too(cluster: Nodes, tmp_path: Path) -> None:
    losses = {}
    for name, address in (("direct", cluster.address), ("client", cluster.client)):
        (tmp_path / name).mkdir()
        output = tmp_path / name / "output"
        compute = {"nodes": 2, "address": address}
        with start(command(tmp_path / name, compute, {"steps": 4}), output) as process:
            assert process.wait(timeout=280) == 0, output.read_text()
        losses[name] = lines(output)
        assert sorted(losses[name]) == [0, 1, 2, 3, 4]
        assert sorted(path.name for path in (tmp_path / name / "work/logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert losses["direct"] == losses["client"]


def test_a_job_goes_on_with_fewer_devices_when_a_node_is_gone(cluster: Nodes, tmp_path: Path) -> None:
    output = tmp_path / "output"
    train = {"steps": 600, "evaluate_every_steps": 600, "checkpoint": {"every_steps": 10}}
    compute = {"nodes": 2, "address": cluster.address, "min_devices": 1, "retries": 1}
    with start(command(tmp_path, compute, train), output) as process:
        wait_for(lambda: max(lines(output), default=0) >= 15, 200, "step 15")
        assert sorted(read_pulses(tmp_path / "work")) == [0, 1]
        cluster.lose_one()
        assert process.wait(timeout=290) == 0, output.read_text()
    text = output.read_text()
    assert "1 of 2 devices are left: going on with 1" in text
    assert "resumed" in text
    assert sorted(lines(output)) == list(range(601))
