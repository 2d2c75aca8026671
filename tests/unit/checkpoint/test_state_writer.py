"""The host's copy of a rank's shards: its memory, and that what was copied is there."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from posttrain_lib.checkpoint.state_layout import parts_of
from posttrain_lib.checkpoint.state_writer import HostBuffer, RankImage
from posttrain_lib.errors import CheckpointError


class Driver:
    """What a CUDA driver is told of the host's pages, on a machine without one. A page that is given back before it is
    unpinned ends the process here."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        if address in self.pinned:
            return 712  # already registered
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        ctypes.string_at(address, self.pinned.pop(address))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


def test_a_buffer_is_pinned_once_and_unpinned_before_it_grows_or_goes(driver: Driver) -> None:
    buffer = HostBuffer()
    buffer.reserve(5000, pinned=True)
    assert list(driver.pinned.values()) == [8192]
    buffer.reserve(100, pinned=True)
    assert list(driver.pinned.values()) == [8192]
    buffer.reserve(9000, pinned=True)
    assert list(driver.pinned.values()) == [12288]
    del buffer
    gc.collect()
    assert driver.pinned == {}


def test_a_later_buffer_at_the_same_address_is_pinned_itself(driver: Driver) -> None:
    """As in a process that trains twice: pages that stay pinned under an address take the second run's copies."""
    for _ in range(8):
        buffer = HostBuffer()
        assert buffer.reserve(1 << 20, pinned=True).data_ptr() in driver.pinned
        del buffer
        gc.collect()
    assert driver.pinned == {}


def test_on_a_cpu_nothing_is_pinned(driver: Driver) -> None:
    HostBuffer().reserve(100, pinned=False)
    assert driver.pinned == {}


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 2000)])
def test_a_copy_that_did_not_arrive_is_found(shape: tuple[int, ...]) -> None:
    tensors = {"weight": torch.randn(shape).bfloat16(), "scale": torch.full((1,), float("nan"))}
    parts = [part for name, tensor in tensors.items() for part in parts_of(name, tensor)]
    image = RankImage(parts, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, HostBuffer())
    image.copy(None)
    image._check_arrival()
    image._bytes.zero_()
    with pytest.raises(CheckpointError, match="did not arrive"):
        image._check_arrival()
