"""Training killed at random points, as often as it takes: every loss and the final weights are the same bits.

Killed with SIGKILL: the one process of a job, a rank of two, and with Ray a worker, the driver, the raylet and the GCS;
while they load, train or save, on a disk and on an object store that fails in between.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.compute.processes import descendants
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support import launched
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.killable import Attempt, Work, fork_server
from tests.support.s3 import s3_client, s3_environment, s3_server

STEPS = 8
TRAIN = {"steps": STEPS, "checkpoint": {"every_steps": 1, "keep_last": 2}, "evaluate_every_steps": 4}
NAMES = ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@dataclass
class Untouched:
    """A run that nobody disturbs: losses by step, final weights."""

    folder: Path
    world: int
    losses: dict[int, str] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(self, lines: list[str]) -> None:
        for line in lines:
            step, loss = line.split()[:2]
            assert self.losses[int(step)] == loss, f"step {step} came out differently after a kill"

    def check_weights(self, checkpoint: str | Path) -> None:
        found = load_model_state(checkpoint)
        assert found.keys() == self.weights.keys()
        assert all(torch.equal(found[name], value) for name, value in self.weights.items())


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def untouched(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Untouched]:
    """By number of ranks: each rounds its sums in its own way."""
    folder = tmp_path_factory.mktemp("untouched")
    make_job(folder, tiny_config(**TRAIN))
    runs = {}
    for world in (1, 2):
        work = Work(folder, f"whole-{world}", TRAIN, world, {})
        attempt = Attempt(server, work, folder / f"whole-{world}.log")
        assert attempt.join() == [0] * world
        losses = {int(line.split()[0]): line.split()[1] for line in attempt.lines()}
        weights = load_model_state(folder / f"whole-{world}/checkpoints/step-{STEPS:08d}")
        runs[world] = Untouched(folder, world, losses, weights)
    return runs


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[FaultyProxy, dict[str, str]]]:
    """A proxy before an S3 server with a bucket "runs", and the environment in which it is found."""
    with s3_server() as url, faulty_proxy(url) as proxy, s3_environment(proxy.url):
        s3_client(url).mkdir("runs")
        yield proxy, {name: os.environ[name] for name in NAMES}


class Killer:
    """Starts jobs, kills them at points of its choice, and looks at what came out. ``kills`` counts, by kind."""

    def __init__(self, server: ForkServerContext, seed: int) -> None:
        self._server, self._random = server, random.Random(seed)
        self.kills: dict[str, int] = {}
        self._rounds = 0

    def disk(self, run: Untouched, kills: int) -> None:
        """Until there were so many kills, and then to the end."""
        self._rounds += 1
        work = Work(run.folder, f"killed-{run.world}-{self._rounds}-{id(self)}", TRAIN, run.world, {})
        checkpoints = run.folder / work.work / "checkpoints"
        self._run(run, work, kills, "rank" if run.world > 1 else "driver", lambda: _is_saving(checkpoints))
        run.check_weights(checkpoints / f"step-{STEPS:08d}")

    def store(self, run: Untouched, kills: int, proxy: FaultyProxy, environment: dict[str, str]) -> None:
        """The same, with checkpoints in a store that fails now and then."""
        self._rounds += 1
        proxy.reset()
        folder = f"s3://runs/{self._rounds}-{id(self)}"
        policy = {**TRAIN["checkpoint"], "folder": folder}  # type: ignore[dict-item]
        work = Work(
            run.folder, f"s3-{self._rounds}-{id(self)}", {**TRAIN, "checkpoint": policy}, run.world, environment
        )

        def is_saving() -> bool:
            return any(seen.method == "PUT" and "tensors" in seen.key for seen in proxy.seen)

        def disturb() -> None:
            with proxy.lock:
                proxy.seen.clear()
                proxy.faults[:] = [
                    Fault(self._random.randrange(3), status=self._random.choice([None, 500, 503]), method=method)
                    for method in ("GET", "PUT", "DELETE")
                ]

        self._run(run, work, kills, "driver, store", is_saving, disturb)
        proxy.reset()
        run.check_weights(f"{folder}/{work.work}/step-{STEPS:08d}")

    def _run(
        self,
        run: Untouched,
        work: Work,
        kills: int,
        kind: str,
        is_saving: Callable[[], bool],
        disturb: Callable[[], None] = lambda: None,
    ) -> None:
        for number in range(1000):
            disturb()
            attempt = Attempt(self._server, work, run.folder / f"{work.work}-{number}.log")
            in_save = self._random.random() < 0.4
            # The resumed step's report is the first line; up to it the kill finds the process loading or reading.
            wanted = self._random.choice([0, 1, 1, 2, 3])
            pause = self._random.random() * 0.05
            if (
                number < kills
                and attempt.wait_until(lambda: len(attempt.lines()) >= wanted)  # noqa: B023
                and (not in_save or attempt.wait_until(is_saving))
                and attempt.wait_until(_after(pause * (0.2 if in_save else 1.0)))
            ):
                attempt.kill(self._random.randrange(run.world))
                name = f"{kind}{', in a save' if in_save else ''}"
                self.kills[name] = self.kills.get(name, 0) + 1
            codes = attempt.join()
            run.check(attempt.lines())
            if codes == [0] * run.world:
                assert int(attempt.lines()[-1].split()[0]) == STEPS
                return
            assert -min(code or 0 for code in codes) == signal.SIGKILL, "only what was killed may fail"
        raise AssertionError("the job never came to its end")


def _is_saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".step-*.partial"))


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def test_killed_a_few_times(
    server: ForkServerContext, untouched: dict[int, Untouched], store: tuple[FaultyProxy, dict[str, str]]
) -> None:
    killer = Killer(server, seed=0)
    killer.disk(untouched[1], 2)
    killer.store(untouched[1], 2, *store)
    killer.disk(untouched[2], 1)
    assert sum(killer.kills.values()) >= 4, killer.kills


@pytest.mark.slow
def test_killed_fifty_times(
    server: ForkServerContext, untouched: dict[int, Untouched], store: tuple[FaultyProxy, dict[str, str]]
) -> None:
    killer = Killer(server, seed=1)
    while sum(killer.kills.values()) < 54:
        killer.disk(untouched[1], 6)
        killer.store(untouched[1], 6, *store)
        killer.disk(untouched[2], 6)
    print(killer.kills)
    assert sum(count for name, count in killer.kills.items() if "in a save" in name) >= 10, killer.kills


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::TrainingWorker", "driver", "raylet/raylet", "gcs_server"])
def test_killed_under_ray(untouched: dict[int, Untouched], tmp_path: Path, victim: str) -> None:
    """The run goes on by itself, or by the same command again; at most three starts."""
    run = untouched[2]
    make_job(tmp_path, tiny_config(**TRAIN))
    command = launched.command(tmp_path, {"devices_per_node": 2, "threads_per_worker": 1, "retries": 1}, TRAIN)
    wanted = random.Random(victim).randrange(1, STEPS - 2)
    for start in range(3):
        with launched.start(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line[:1].isdigit():  # what Ray says
                    continue
                run.check([line])
                if start == 0 and int(line.split()[0]) == wanted:
                    pids = [process.pid] if victim == "driver" else _named(process.pid, victim)
                    assert pids, f"no process is called {victim}"
                    os.kill(pids[0], signal.SIGKILL)
        if process.returncode == 0:
            break
    assert process.returncode == 0
    run.check_weights(tmp_path / f"work/checkpoints/step-{STEPS:08d}")


def _named(root: int, name: str) -> list[int]:
    """Processes below ``root`` whose command has ``name``."""
    found = []
    for pid in descendants(root):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
        if name in command:
            found.append(pid)
    return found
