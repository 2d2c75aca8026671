"""What the plan makes of recomputation and compilation."""

from pathlib import Path

import pytest

from posttrain_lib.compute.plan import make_plan
from posttrain_lib.config import load_run_config
from posttrain_lib.errors import ConfigError
from steps import plan
from steps.pipeline import DEFAULT_CONFIG


def test_activations_shrink_with_what_is_computed_again() -> None:
    activations = []
    for mode in ("none", "selective", "full"):
        config = load_run_config(DEFAULT_CONFIG, [f"train.activation_checkpointing={mode}"])
        spec = plan._spec(config)
        assert spec is not None
        activations.append(make_plan(spec, config).memory_bytes["activations"])
    assert activations[0] > 1.5 * activations[1] > 3 * activations[2]


def test_a_machine_that_cannot_compile_is_found_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch._inductor import config as inductor

    torch._dynamo.reset()  # an earlier test may have compiled the same line
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-such-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = load_run_config(DEFAULT_CONFIG, ["train.compile=blocks", "compute.device=cpu"])
    with pytest.raises(ConfigError, match=r"cannot compile the model's blocks"):
        plan.describe(config)
    # workers on other machines look for themselves
    elsewhere = load_run_config(DEFAULT_CONFIG, ["train.compile=blocks", "compute.address=head:6379"])
    assert "plan of" in plan.describe(elsewhere)
