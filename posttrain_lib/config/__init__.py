"""Strict, frozen, torch-free models of a run file. ``load_run_config`` is the way in."""

from posttrain_lib.config.load import load_run_config
from posttrain_lib.config.run import RunConfig

__all__ = ["RunConfig", "load_run_config"]
