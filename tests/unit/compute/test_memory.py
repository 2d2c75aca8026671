"""Out of memory: which errors are, what to lower in which order, and the kernel's counters."""

import resource
from pathlib import Path

import pytest
import torch

from posttrain_lib.compute.memory import KillEvidence, is_out_of_memory, memory_errors, remedies
from posttrain_lib.errors import TrainingError
from posttrain_lib.training import pulse
from tests.oracles.tiny_job import make_job, tiny_config


def test_a_real_allocation_that_fails_says_what_to_lower(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config())
    pulse.begin()
    pulse.beat("training step", 7)
    with pytest.raises(TrainingError, match="out of memory") as caught, memory_errors(job):
        torch.empty(2**60, dtype=torch.uint8)
    error = caught.value
    assert error.where == "rank 0, step 7, training step"
    assert error.fix is not None and error.fix.index("micro_batch_rows") < error.fix.index("activation_checkpointing")


def test_a_limit_on_the_process_is_met_in_the_same_words(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config())
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        with pytest.raises(TrainingError, match="out of memory"), memory_errors(job):
            bytearray(2**32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_which_errors_are_of_memory(tmp_path: Path) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shape"), memory_errors(make_job(tmp_path, tiny_config())):
        raise RuntimeError("shape mismatch")


def test_what_is_at_its_least_is_not_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(micro_batch_rows=1, activation_checkpointing="full"))
    said = " ".join(remedies(job, "training step"))
    assert "micro_batch_rows" not in said and "activation_checkpointing" not in said and "row_tokens" in said
    assert remedies(job, "model")[0].startswith("share weights"), "nothing else helps while weights are loaded"


@pytest.mark.parametrize(
    ("membership", "file"),
    [("0::/a/b", "a/b/memory.events"), ("0::/a/b", "memory.events"), ("4:memory:/c", "memory/c/memory.oom_control")],
)
def test_kills_of_the_kernel_are_counted_from_now_on(membership: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(f"9:cpu:/x\n{membership}\n")
    counter = tmp_path / "cgroups" / file
    counter.parent.mkdir(parents=True)
    counter.write_text("low 0\noom 5\noom_kill 2\n")
    evidence = KillEvidence(tmp_path / "cgroups", tmp_path / "membership")
    assert evidence.found() is None
    counter.write_text("low 0\noom 9\noom_kill 3\n")
    assert "killed 1 for memory" in str(evidence.found())
    counter.unlink()
    assert evidence.found() is None


def test_this_machine_has_counters_or_none_and_neither_is_an_error() -> None:
    assert KillEvidence().found() is None
