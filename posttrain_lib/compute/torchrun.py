"""Ranks that torchrun started: rank 0 is the step's driver and trains too, the others wait for its orders.

    torchrun --nproc-per-node 8 -m steps.train --config ... --set compute.devices_per_node=8

Rank 0 runs the step as one process would, with its store, locks and terminal. A job that it launches goes to the
others through torchrun's own key-value store; what becomes of them comes back the same way. Restarting is torchrun's
part (``--max-restarts``): the step then goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.compute.heart import OwnWatch, clear
from posttrain_lib.compute.logs import logs_folder, redirect
from posttrain_lib.compute.rank import run_rank
from posttrain_lib.errors import RETRY_EXIT_CODE, ConfigError, PosttrainError, PreemptedError, TrainingError

if TYPE_CHECKING:
    from posttrain_lib.config.compute import ComputeConfig
    from posttrain_lib.training.job import TrainJob
    from posttrain_lib.training.loop import Events

_PARENT_SECONDS = 1.0
_POLL_SECONDS = 0.2
#: after rank 0 has failed, how long to listen for a rank that failed before it
_SETTLE_SECONDS = 5.0
_VICTIM_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


def run(body: Callable[[], None]) -> None:
    """What a process under torchrun does: rank 0 runs ``body``, the others what it launches.

    None of them outlives torchrun, however that ends.
    """
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    # Left set, torch would expect torchrun's own store at every address, also at the job's rendezvous.
    _Post.agent_serves = os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    if int(os.environ["RANK"]) > 0:
        _follow()
        return
    try:
        body()
    finally:
        with contextlib.suppress(RuntimeError):  # the store is gone with torchrun, and with it whoever would listen
            _Post().send(None)


def lead(job: TrainJob, compute: ComputeConfig) -> Events:
    """Run ``job`` on all ranks that torchrun started; in rank 0.

    Raises:
        ConfigError: torchrun started another number of processes than the compute section has devices.
        TrainingError: a rank failed; which, and why, comes first.
    """
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (world, local) != (compute.workers, compute.devices_per_node):
        raise ConfigError(
            "torchrun started another number of processes than the compute section has devices",
            where="compute.nodes, compute.devices_per_node",
            got=f"{world} processes, {local} on this node",
            expected=f"{compute.nodes} x {compute.devices_per_node}",
            fix=f"start it with --nnodes {compute.nodes} --nproc-per-node {compute.devices_per_node}, or change the "
            "section",
        )
    from posttrain_lib.parallel.process_group import free_port

    work = Path(job.work_dir)
    clear(work)
    job = dataclasses.replace(job, rendezvous=f"{os.environ['MASTER_ADDR']}:{free_port()}")
    post = _Post()
    post.send((job, list(compute.stop_signals)))
    with OwnWatch(work, compute.hang_seconds):
        try:
            return (yield from run_rank(job, compute.stop_signals))
        except Exception as error:
            raise _first_cause(error, post, job) from error


class _Post:
    """The store that torchrun gives its ranks, with a part of it for each of its restarts."""

    agent_serves = False
    _sent = 0
    _store: Any = None

    def __init__(self) -> None:
        if _Post._store is not None:
            return
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=None,
            is_master=os.environ["RANK"] == "0" and not _Post.agent_serves,
            wait_for_workers=False,
        )
        _Post._store = PrefixStore(f"posttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def send(self, orders: Any) -> None:
        """The next orders to all other ranks; None: there will be no more."""
        self._store.set(f"orders/{_Post._sent}", pickle.dumps(orders))
        _Post._sent += 1

    def receive(self, number: int) -> Any:
        """Wait for the orders of that number, however long they take."""
        key = f"orders/{number}"
        while not self._store.check([key]):  # the store's own wait complains after every time limit
            time.sleep(_POLL_SECONDS)
        return pickle.loads(self._store.get(key))

    def report(self, rank: int, error: BaseException) -> None:
        """Say that this rank failed."""
        ours = error if isinstance(error, PosttrainError) else None
        self._store.set(f"failed/{rank}", pickle.dumps((ours, str(error), traceback.format_exc())))

    def failure(self, rank: int) -> tuple[PosttrainError | None, str, str] | None:
        """What that rank said of its failure; None: nothing."""
        key = f"failed/{rank}"
        return pickle.loads(self._store.get(key)) if self._store.check([key]) else None


def _follow() -> None:
    """Train whatever rank 0 launches, as this process's rank; output goes to the rank's log."""
    rank, post, number = int(os.environ["RANK"]), _Post(), 0
    while (orders := post.receive(number)) is not None:
        number += 1
        job, stop_signals = orders
        redirect(Path(job.work_dir), rank)
        try:
            for _ in run_rank(dataclasses.replace(job, rank=rank), stop_signals):
                pass
        except BaseException as error:
            post.report(rank, error)
            traceback.print_exc()
            time.sleep(_SETTLE_SECONDS)  # torchrun stops all when one ends, and rank 0 is to say why first
            raise SystemExit(RETRY_EXIT_CODE if isinstance(error, PreemptedError) else 1) from None


def _first_cause(own: Exception, post: _Post, job: TrainJob) -> Exception:
    """What to raise for the rank that failed first; rank 0 itself, if it is no victim of another."""
    if isinstance(own, PosttrainError):
        return own
    if not any(text in str(own) for text in _VICTIM_TEXTS):
        return own
    deadline = time.monotonic() + _SETTLE_SECONDS / 2
    failed: dict[int, tuple[PosttrainError | None, str, str]] = {}
    while time.monotonic() < deadline:
        for rank in range(1, job.world):
            if rank not in failed and (said := post.failure(rank)) is not None:
                failed[rank] = said
        if any(ours is not None or not _is_victim(text) for ours, text, _ in failed.values()):
            break
        time.sleep(0.1)
    for ours, _, _ in failed.values():
        if ours is not None:
            return ours
    logs = logs_folder(Path(job.work_dir))
    for rank, (_, text, trace) in failed.items():
        if not _is_victim(text):
            print(f"--- rank {rank} failed:\n{trace.rstrip()}\n---", file=sys.stderr, flush=True)
            return TrainingError(
                f"rank {rank} failed: {text.strip().splitlines()[0] if text.strip() else 'without a word'}",
                where=f"rank {rank}",
                fix=f"see its traceback above; what every other rank printed is in {logs}",
            )
    return TrainingError(
        "a rank's process is gone",
        where=f"one of ranks 1 to {job.world - 1}",
        got=str(own).strip().splitlines()[0],
        fix=f"see torchrun's own report and {logs}; with --max-restarts it goes on from the last checkpoint",
    )


def _is_victim(text: str) -> bool:
    return any(sign in text for sign in _VICTIM_TEXTS)


def _leave_with(parent: int) -> None:
    """End this process when torchrun is gone: killed, it tells nobody."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)
