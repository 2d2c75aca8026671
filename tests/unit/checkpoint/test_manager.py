"""Checkpoints are whole or not there: retention, damage, formats, a full disk, random generators."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.manager import FORMAT_VERSION, CheckpointManager, load_model_state
from posttrain_lib.checkpoint.state_files import LocalFiles
from posttrain_lib.errors import CheckpointError
from posttrain_lib.optim import build_optimizer
from posttrain_lib.training.state import Progress, TrainState
from tests.oracles.tiny_job import tiny_config

#: with a local folder: what it returns are paths, never URLs
Manager: Any = CheckpointManager


class Position:
    """The loader's part: a position that is a number."""

    def __init__(self) -> None:
        self.value = 0

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def make_state(step: int = 0, best: int | None = None, size: int = 8) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.LayerNorm(size))
    optimizer = build_optimizer(model, tiny_config().optimizer)
    model(torch.randn(4, size)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    position: Any = Position()
    made: Any = model
    state = TrainState(made, optimizer, position, {"seed": 0}, Progress(step=step, best_step=best), {"step": step})
    position.value = step
    return state


def tensors_of(state: TrainState) -> list[torch.Tensor]:
    moments = [value for entry in state.optimizer.state_dict()["state"].values() for value in entry.values()]
    return [*state.model.state_dict().values(), *moments]


def test_retention_keeps_every_so_many_steps(tmp_path: Path) -> None:
    manager = Manager(tmp_path, keep_last=1, keep_every_steps=3)
    for step in range(1, 8):
        manager.save(make_state(step))
    assert [int(name[-1]) for name in names(tmp_path)] == [3, 6, 7]


def test_a_copy_under_another_name_is_left_alone_and_takes_no_place(tmp_path: Path) -> None:
    manager = Manager(tmp_path, keep_last=2, keep_every_steps=10)
    first = manager.save(make_state(1))
    shutil.copytree(first, tmp_path / "step-00000001-before-the-change")
    shutil.copytree(first, tmp_path / "step-99999999.bak")
    for step in range(2, 5):
        manager.save(make_state(step))
    kept = ["step-00000001-before-the-change", "step-00000003", "step-00000004", "step-99999999.bak"]
    assert names(tmp_path) == kept
    assert manager.newest() == tmp_path / "step-00000004"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    manager, state = Manager(tmp_path / "c", 2), make_state(step=3)
    path = manager.save(state)
    drawn = (random.random(), np.random.random(), torch.rand(3))
    other = make_state(step=99)
    assert manager.newest() == path
    manager.load(path, other)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))
    assert (other.progress, other.loader.value, other.report) == (state.progress, 3, {"step": 3})
    again = (random.random(), np.random.random(), torch.rand(3))
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_the_values_of_the_moment_of_saving_are_kept(tmp_path: Path) -> None:
    """What is written while training goes on is what stood there when ``save`` was called."""
    manager, state = Manager(tmp_path, 2, asynchronous=True), make_state(1, size=256)
    saved = [value.clone() for value in tensors_of(state)]
    manager.save(state)
    manager.before_update()
    with torch.no_grad():
        for value in tensors_of(state):
            value.zero_()
    state.progress.step, state.loader.value = 2, 7
    manager.wait()
    assert manager.take_stall_seconds() > 0
    assert manager.take_stall_seconds() == 0
    manager.resume(state)
    assert all(torch.equal(a, b) for a, b in zip(saved, tensors_of(state), strict=True))
    assert (state.progress.step, state.loader.value) == (1, 1)


def test_a_fresh_optimiser_gets_what_was_saved_and_loses_what_was_not(tmp_path: Path) -> None:
    manager, state = Manager(tmp_path, 2), make_state(1)
    fresh = make_state()
    fresh.optimizer = build_optimizer(fresh.model, tiny_config().optimizer)
    path = manager.save(state)
    manager.load(path, fresh)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(fresh), strict=True))
    assert all(parameter.grad is None for parameter in fresh.model.parameters())
    # saved before its first step: nothing is in it, and that comes back as well
    before = make_state(2)
    before.optimizer = build_optimizer(before.model, tiny_config().optimizer)
    manager.load(manager.save(before), state)
    assert not state.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(before), tensors_of(state), strict=True))


def test_numbers_that_an_optimiser_keeps_beside_tensors_come_back(tmp_path: Path) -> None:
    manager, state = Manager(tmp_path, 2), make_state(1)
    state.optimizer.param_groups[0]["found"] = 0.1 + 0.2
    weight = next(state.model.parameters())
    state.optimizer.state[weight]["count"] = 12345678901234567
    path, other = manager.save(state), make_state()
    other.optimizer.param_groups[0]["found"] = 0.0
    manager.load(path, other)
    assert other.optimizer.param_groups[0]["found"] == 0.1 + 0.2
    assert other.optimizer.state[next(other.model.parameters())]["count"] == 12345678901234567


def test_the_last_that_is_left_is_checked_before_it_is_read(tmp_path: Path) -> None:
    said: list[str] = []
    manager, state = Manager(tmp_path, 2, say=said.append), make_state()
    bad = manager.save(make_state(1)) / "tensors-0.bin"
    bad.write_bytes(bytes([bad.read_bytes()[0] ^ 1]) + bad.read_bytes()[1:])
    before = [value.clone() for value in tensors_of(state)]
    assert manager.resume(state) is None
    assert "another crc32" in said[0]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    assert state.progress == Progress()


def damaged(checkpoint: Path, place: int) -> Path:
    """The checkpoint with a flipped bit at that place of its tensors."""
    image = checkpoint / "tensors-0.bin"
    content = bytearray(image.read_bytes())
    content[place] ^= 1
    image.write_bytes(content)
    return checkpoint


def test_damaged_values_are_never_taken_for_the_start(tmp_path: Path) -> None:
    """The newest is found damaged when most of it stands in the model already; so no run may begin with that."""
    manager, state = Manager(tmp_path, 2, say=lambda text: None), make_state()
    for step in (1, 2):
        damaged(manager.save(make_state(step)), -70)
    before = [value.clone() for value in tensors_of(state)]
    with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
        manager.resume(state)
    assert not all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    assert "step-00000001: tensors-0.bin" in str(caught.value.got) and "step-00000002" in str(caught.value.got)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_of_a_later_step_pushes_no_whole_one_out(tmp_path: Path, keep: int) -> None:
    """The run goes on from the one before it, and saves steps that come before the damaged one's."""
    manager, state = Manager(tmp_path, 2, say=lambda text: None), make_state()
    manager.save(make_state(10))
    bad = damaged(manager.save(make_state(20)), 0)
    manager.keep_last = keep
    manager.resume(state)
    for step in (12, 14, 16):
        state.progress.step = step
        saved = manager.save(state)
        assert manager.newest() == saved
    assert len(names(tmp_path)) == keep + 1 and bad.name in names(tmp_path)
    state.progress.step = 20
    assert manager.save(state) == manager.newest() == bad
    assert len(names(tmp_path)) == keep


def test_weights_in_a_plain_process(tmp_path: Path) -> None:
    state = make_state(step=1)
    weights = load_model_state(Manager(tmp_path, 1).save(state))
    assert set(weights) == set(state.model.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in state.model.state_dict().items())
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_retention_keeps_the_last_and_the_best_of_each_kept(tmp_path: Path) -> None:
    manager = Manager(tmp_path, keep_last=2)
    kept = []
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)]:
        manager.save(make_state(step, best))
        kept.append([int(name[-1]) for name in names(tmp_path)])
    # At 4, step 3 still calls 1 its best: should 4 turn out torn, a resume from 3 finds it.
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [4, 5, 6]]


@pytest.mark.parametrize("file", ["tensors-0.bin", "tensors-0.json", "state.json", "rng-0.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_damage_is_named_and_passed_over(tmp_path: Path, file: str, harm: str) -> None:
    said: list[str] = []
    manager = Manager(tmp_path, 3, say=said.append)
    good, bad = manager.save(make_state(1)), manager.save(make_state(2))
    content = (bad / file).read_bytes()
    if harm == "missing":
        (bad / file).unlink()
    elif harm == "truncated":
        (bad / file).write_bytes(content[: len(content) // 2])
    else:
        (bad / file).write_bytes(bytes([content[0] ^ 0x80]) + content[1:])
    for look in (manager.newest, lambda: manager.resume(make_state())):
        assert look() == good
        assert len(said) == 1
        assert said[0].startswith("skipped checkpoint step-00000002: ")
        assert file in said.pop()
    with pytest.raises(CheckpointError, match="damaged"):
        load_model_state(bad)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "tensors-0.json"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_the_disk_cannot_read_is_damage_and_what_is_away_is_not(
    tmp_path: Path, file: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not go back behind a checkpoint that may be whole, and removes no best one that it cannot ask for."""
    said: list[str] = []
    manager = Manager(tmp_path, 1, say=said.append)
    good, bad = manager.save(make_state(1, best=1)), manager.save(make_state(2, best=1))
    read = LocalFiles.text

    def failing(files: LocalFiles, name: str) -> str:
        if files.where(name) == str(bad / file):
            raise OSError(code, os.strerror(code))
        return read(files, name)

    monkeypatch.setattr(LocalFiles, "text", failing)
    if code == errno.EIO:
        assert manager.resume(make_state()) == good
        assert said[0].startswith(f"skipped checkpoint step-00000002: {file} cannot be read")
        return
    with pytest.raises(CheckpointError, match="cannot be read"):
        manager.resume(make_state())
    if file == "state.json":
        with pytest.raises(CheckpointError):
            manager._retain(bad.name)
    assert names(tmp_path) == [good.name, bad.name]


@pytest.mark.parametrize("world", [0, 2, "1", None])
def test_a_wrong_number_of_ranks_is_damage(tmp_path: Path, world: Any) -> None:
    """Of too many ranks there are no files; of too few, tensors would be missing without a word."""
    said: list[str] = []
    manager = Manager(tmp_path, 3, say=said.append)
    good, bad = manager.save(make_state(1)), manager.save(make_state(2))
    manifest = bad / "manifest.json"
    content = {**json.loads(manifest.read_text()), "world": world}
    manifest.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    for look in (manager.newest, lambda: manager.resume(make_state())):
        assert look() == good
        assert said.pop().startswith("skipped checkpoint step-00000002: manifest.json ")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model_state(bad)


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    manager = Manager(tmp_path, 2)
    good = manager.save(make_state(1))
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000002.partial/tensors-0.bin").write_bytes(b"torn")
    assert manager.newest() == good
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(("change", "words"), [(1, "newer format"), (-1, "older format")])
def test_another_format_is_refused_not_passed_over(tmp_path: Path, change: int, words: str) -> None:
    manager = Manager(tmp_path, 2)
    manager.save(make_state(1))
    manifest = manager.save(make_state(2)) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": FORMAT_VERSION + change}))
    for look in (manager.newest, lambda: manager.resume(make_state()), lambda: load_model_state(manifest.parent)):
        with pytest.raises(CheckpointError, match=words) as caught:
            look()
        assert "version of this project that wrote it" in str(caught.value.fix)


def test_another_model_is_refused(tmp_path: Path) -> None:
    manager = Manager(tmp_path, 2)
    path = manager.save(make_state(1))
    with pytest.raises(CheckpointError, match="does not fit"):
        manager.load(path, make_state(size=16))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses to grow any file of this process beyond ``limit`` bytes, as a full disk or quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limit", [20_000, 500])
def test_a_full_disk_leaves_the_old_checkpoints_and_no_rest(tmp_path: Path, limit: int, asynchronous: bool) -> None:
    """Half way through the tensors (50 kB), and at their start."""
    manager, state = Manager(tmp_path, 2, asynchronous=asynchronous), make_state(1, size=64)
    good = manager.save(state, wait=True)
    state.progress.step = 2
    with file_size_limit(limit), pytest.raises(CheckpointError, match="could not be written") as caught:
        manager.save(state)
        manager.before_update()  # says nothing: ranks reach it at different times
        manager.wait()
    assert "rank 0" in str(caught.value.got)
    assert names(tmp_path) == ["step-00000001"]
    assert manager.newest() == good
    assert manager.save(state, wait=True).name == "step-00000002", "and once there is room, it is written"
    manager.load(manager.newest(), make_state(size=64))
