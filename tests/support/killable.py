"""Training processes that are cheap to start and to kill: forked from one that has imported everything.

A started process of its own imports torch for seconds; a fork of a process that has is there in a moment, and so a test
can afford dozens of kills. Nothing but the folder survives one, as with any other process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import MeshSpec

#: what a rank gets to end by itself once a peer is gone
_PATIENCE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained: a tiny job in ``folder``, its work folder, the train section, ranks, the environment."""

    folder: Path
    work: str
    train: Mapping[str, Any]
    world: int
    environment: Mapping[str, str]


class Attempt:
    """One start of a job: a process for each rank. ``lines``: what rank 0 said, ``<step> <loss as hex> <event>``."""

    def __init__(self, context: ForkServerContext, work: Work, log: Path) -> None:
        self._log = log
        log.write_text("")
        rendezvous = f"127.0.0.1:{free_port()}"
        self.ranks = [
            context.Process(target=_train, args=(work, rank, rendezvous, log), daemon=True)
            for rank in range(work.world)
        ]
        for process in self.ranks:
            process.start()

    def lines(self) -> list[str]:
        """Whole lines so far."""
        return self._log.read_text().rpartition("\n")[0].splitlines()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Until it holds; False where the job ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not all(process.is_alive() for process in self.ranks):
                return False
            assert time.monotonic() < deadline, f"nothing happened for {seconds:.0f} s; said so far: {self.lines()}"
            time.sleep(0.002)
        return True

    def kill(self, rank: int) -> None:
        """SIGKILL for one rank. The others notice and end by themselves; where the ranks had not met yet, and they wait
        for the one that will not come, they are killed, as a launcher would."""
        self.ranks[rank].kill()
        for process in self.ranks:
            process.join(_PATIENCE_SECONDS)
            process.kill()
        self.join()

    def join(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes, by rank, once all have ended."""
        for process in self.ranks:
            process.join(seconds)
            assert process.exitcode is not None, f"a rank still runs {seconds:.0f} s after the others ended"
        return [process.exitcode for process in self.ranks]


def fork_server() -> ForkServerContext:
    """Where attempts are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.oracles.tiny_job", "posttrain_lib.training.loop", "s3fs"])
    return context


def _train(work: Work, rank: int, rendezvous: str, log: Path) -> None:
    os.environ.update(work.environment)
    # What a killed peer makes the others say is of no interest here.
    errors = os.open(log.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    from posttrain_lib.training.loop import train
    from tests.oracles.tiny_job import make_job, tiny_config

    job = make_job(work.folder, tiny_config(**work.train), work=work.work, loader_workers=0)
    job = dataclasses.replace(job, rank=rank, mesh=MeshSpec(shard=work.world), rendezvous=rendezvous)
    for report in train(job):
        if rank == 0:
            loss = "-" if report.loss is None else float(report.loss).hex()
            with open(log, "a") as out:
                out.write(f"{report.step} {loss} {report.event}\n")
