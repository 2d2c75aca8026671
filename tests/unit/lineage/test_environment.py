"""What is said of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain_lib.lineage import environment
from posttrain_lib.lineage.environment import describe_hardware

#: as drivers of the 550 series write them
INFORMATION = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 110\nGPU UUID: \t GPU-0\nVideo BIOS: \t 96.00\n"
VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with ``driver`` and ``dev`` in place of the machine's own."""
    monkeypatch.setattr(environment, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(environment, "_DEVICES", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    describe_hardware.cache_clear()
    yield tmp_path
    describe_hardware.cache_clear()


def test_a_machine_without_gpus(machine: Path) -> None:
    facts = describe_hardware()
    assert set(facts) == {"machine", "cpu", "cores", "memory"}
    assert facts["cores"] == str(os.cpu_count()) and float(facts["memory"].removesuffix(" GiB")) > 0


def test_gpus_as_their_driver_tells_of_them(machine: Path) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (machine / "driver" / "gpus" / bus).mkdir(parents=True)
        (machine / "driver" / "gpus" / bus / "information").write_text(INFORMATION)
    (machine / "driver" / "version").write_text(VERSION)
    facts = describe_hardware()
    assert facts["gpus"] == "NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3"
    assert facts["gpu driver"] == "550.54.15"


def test_a_container_that_shows_the_devices_alone(machine: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (machine / "dev" / name).touch()
    facts = describe_hardware()
    assert facts["gpus"] == "NVIDIA, model not told, NVIDIA, model not told" and facts["gpu driver"] == "not told"
