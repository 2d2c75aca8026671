"""Stopping together: one rank that was asked to stop takes all the others with it, behind the same step."""

from __future__ import annotations

from posttrain_lib.errors import PreemptedError
from posttrain_lib.parallel.process_group import gather_objects, global_max
from posttrain_lib.training import pulse


def stop_agreed() -> bool:
    """Whether any rank was asked to stop; the same answer on every rank. A collective of one number."""
    return max(global_max([float(pulse.stop_reason() is not None)])) > 0


def preempted(step: int) -> PreemptedError:
    """What every rank raises behind the checkpoint of ``step``."""
    reason = next((reason for reason in gather_objects(pulse.stop_reason()) if reason), "a rank was asked to stop")
    return PreemptedError(
        f"training stopped after step {step}, as asked; its checkpoint is written",
        where=f"step {step}",
        got=reason,
        fix="run the same command again, or let the flow retry: it goes on from that step",
    )
