"""The vLLM engine beyond the contract of rollout engines: how it fails, and what it alone refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import vllm_process
from posttrain_lib.errors import RolloutError
from tests.oracles.tiny_job import write_model
from tests.support.engines import request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    from posttrain_lib.adapters.vllm_engine import VllmEngine

    def started(folder: Path | None = None, **changes: Any) -> VllmEngine:
        return VllmEngine(
            folder or write_model(tmp_path / "model", head_dim=32),
            window=64,
            slots=2,
            options={"dtype": "float32", "enforce_eager": True, **changes},
            environment={"OMP_NUM_THREADS": "1"},
            start_seconds=300,
            call_seconds=100,
        )

    return started


def test_an_engine_that_dies_is_an_error_and_not_the_drivers_death(start: Callable[..., Any]) -> None:
    engine = start()
    for temperature in (0.001, 5.0):
        with pytest.raises(RolloutError, match="does not sample at this temperature"):
            engine.submit([request("a", [1], temperature=temperature)])
    engine.submit([request("a", [1])])
    engine.step()
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="exit code -9"):
        while engine.unfinished:
            engine.step()
    engine.close()
    engine.close()
    for call in (engine.step, engine.sleep, lambda: engine.submit([]), lambda: engine.push([], 1)):
        with pytest.raises(RolloutError, match="closed"):
            call()


def test_an_engine_that_does_not_come_up_says_why(start: Callable[..., Any]) -> None:
    with pytest.raises(RolloutError, match=r"exit code 1 at 'start'[\s\S]*no_such_dtype"):
        start(dtype="no_such_dtype")


def test_experts_are_refused_on_a_cpu(start: Callable[..., Any], family_folder: Callable[[str], Path]) -> None:
    """Pushed again they would be other ones; the canaries would stop the run, but only then."""
    with pytest.raises(RolloutError, match="mixture of experts"):
        start(family_folder("qwen3_moe"))


def test_a_window_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    from posttrain_lib.adapters.vllm_engine import VllmEngine

    with pytest.raises(RolloutError, match=r"got: +65\n.*at most 64"):
        VllmEngine(
            write_model(tmp_path / "model", max_position_embeddings=64),
            window=65,
            slots=1,
            options={},
            environment={},
            start_seconds=300,
            call_seconds=100,
        )
