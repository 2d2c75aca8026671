"""Evaluation tasks by name. Each scores examples one by one, so that every metric has an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.evaluation.tasks.base import Given, Task, TaskResult
from posttrain_lib.registry import check_options, resolve

__all__ = ["TASKS", "Given", "Task", "TaskResult", "build_task"]

TASKS: dict[str, str] = {
    "exact_match": "posttrain_lib.evaluation.tasks.exact_match:ExactMatch",
    "multiple_choice": "posttrain_lib.evaluation.tasks.multiple_choice:MultipleChoice",
    "pass_at_k": "posttrain_lib.evaluation.tasks.pass_at_k:PassAtK",
    "perplexity": "posttrain_lib.evaluation.tasks.perplexity:Perplexity",
    "win_rate": "posttrain_lib.evaluation.tasks.win_rate:WinRate",
}


def build_task(task: str, options: Mapping[str, Any], where: str = "evaluation.tasks") -> Task:
    """The task called ``task``, or a user's own given as ``module:attribute``, made with ``options``.

    Raises:
        ConfigError: no such task, or options that it does not take.
    """
    factory = resolve(task, TASKS, what="evaluation task", where=where)
    check_options(factory, options, what="task", where=where)
    made: Task = factory(**options)
    return made
