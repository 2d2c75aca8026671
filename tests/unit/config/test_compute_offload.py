"""Offloading is of sharded models."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain_lib.config.compute import ComputeConfig


def test_offload_needs_a_second_device() -> None:
    assert ComputeConfig(devices_per_node=2, offload="parameters").offload == "parameters"
    with pytest.raises(ValidationError, match="it needs two devices at least"):
        ComputeConfig(offload="parameters")
