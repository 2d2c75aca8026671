"""What of the evaluation cannot be is said before anything runs: by the plan, and by the step ``inputs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import lm_eval_process
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.lineage.source_digest import project_sources
from steps import evaluate, foresight, inputs
from tests.unit.steps.test_foresight import config_of

GOOD = {"prompt": "Two plus two is", "choices": ["three", "four"], "answer": 1}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def with_tasks(*tasks: dict[str, Any], **more: Any) -> Any:
    return config_of(evaluation={"tasks": list(tasks), **more})


def test_rows_of_a_task_are_refused_by_name_before_anything_runs(questions: Path) -> None:
    config = with_tasks({"task": "multiple_choice", "file": str(questions)})
    foresight.check_names(config)
    with questions.open("a") as handle:
        handle.write(json.dumps(GOOD | {"answer": 2}) + "\n")
    for check in (foresight.check_names, lambda config: inputs.inputs(config, {})):
        with pytest.raises(DataError, match="1 rows of an evaluation task cannot be used") as caught:
            check(config)
        assert "questions.jsonl:2: answer_is_no_index: 2, expected 0 to 1" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = with_tasks({"task": "multiple_choice", "file": str(tmp_path / "none.jsonl")})
    with pytest.raises(DataError, match=r"none\.jsonl"):
        foresight.check_evaluation(config)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"task": "win_rate", "scorer": "nowhere:scorer"}, "the scorer cannot be imported"),
        ({"task": "win_rate", "reward_model": {"path": "nowhere/judge"}}, "there is no such folder"),
        ({"task": "pass_at_k", "verifier": "nowhere:verifier"}, "the verifier cannot be imported"),
        ({"task": "exact_match", "extract": "gsm"}, "unknown way to find an answer"),
        ({"task": "nowhere:Task"}, "the evaluation task cannot be imported"),
    ],
)
def test_names_of_code_are_resolved(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        foresight.check_evaluation(with_tasks(task))


def test_a_judge_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, size in (("own", 320), ("other", 330)):
        rows = generate_rows(20, 0) if name == "own" else [{"messages": [{"content": "xyzzy " * 50}]}]
        build_tokenizer((turn["content"] for row in rows for turn in row["messages"]), size, tmp_path / name)

    class Judged:
        def __init__(self, judge: str) -> None:
            self._judge = judge

        def models(self) -> tuple[str, ...]:
            return (self._judge,)

    evaluate.check_judges({"judged": Judged(str(tmp_path / "own"))}, tmp_path / "own")
    with pytest.raises(DataError, match="different tokenizers") as caught:
        evaluate.check_judges({"judged": Judged(str(tmp_path / "other"))}, tmp_path / "own")
    assert "evaluation.tasks: judged" in str(caught.value)


def test_a_gate_on_a_metric_that_the_task_does_not_have(questions: Path) -> None:
    task = {"task": "multiple_choice", "name": "sums", "file": str(questions)}
    gates = {"metrics": {"sums.accuracy": {"min": 0.1}, "held_out.loss": {"max": 9}}}
    foresight.check_evaluation(with_tasks(task, gates=gates))
    with pytest.raises(ConfigError, match="does not have") as caught:
        foresight.check_evaluation(with_tasks(task, gates={"metrics": {"sums.acuracy": {"min": 0.1}}}))
    assert "did you mean 'sums.accuracy'?" in str(caught.value)


def test_gates_on_a_reward_models_calibration() -> None:
    gates = {"metrics": {"held_out.pair_accuracy": {"min": 0.6}, "held_out.calibration_error": {"max": 0.1}}}
    foresight.check_evaluation(config_of(recipe="reward", reward={}, evaluation={"gates": gates}))
    with pytest.raises(ConfigError, match="does not have"):
        foresight.check_evaluation(with_tasks(gates=gates))


@pytest.mark.parametrize(
    ("evaluation", "asking"),
    [
        ({"exact_match_prompts": 8}, "exact_match_prompts"),
        ({"tasks": [{"task": "pass_at_k", "name": "p"}]}, "evaluation: p"),
        ({"tasks": [{"task": "exact_match", "file": "prompts.jsonl"}]}, None),
        ({}, None),
    ],
)
def test_prompts_that_no_row_can_give_are_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any], asking: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?", "answer": "Tom"}\n')
    text, rows = ({"name": name, "path": "x", "format": name} for name in ("text", "messages"))
    alone, mixed = (config_of(data={"sources": each}, evaluation=evaluation) for each in ([text], [text, rows]))
    foresight.check_evaluation(mixed)
    if asking is None:
        foresight.check_evaluation(alone)
        return
    with pytest.raises(ConfigError, match="held-out prompts are asked, and no source has any") as caught:
        foresight.check_evaluation(alone)
    assert asking in str(caught.value)


@pytest.mark.skipif(lm_eval_process.is_available(), reason="lm_eval is installed")
def test_a_missing_lm_eval_is_said_at_the_start() -> None:
    config = config_of(evaluation={"lm_eval": {"tasks": ["arc_easy"], "limit": 10}})
    for check in (foresight.check_names, lambda config: inputs.inputs(config, {})):
        with pytest.raises(ConfigError, match="lm-evaluation-harness, which is not installed") as caught:
            check(config)
        assert "pip install" in str(caught.value.fix)


def test_what_is_evaluated_does_not_decide_what_is_trained(questions: Path) -> None:
    plain, asked = config_of(), with_tasks({"task": "multiple_choice", "file": str(questions)})
    assert evaluate.settings(plain) != evaluate.settings(asked)
    assert evaluate.settings(asked) == evaluate.settings(
        with_tasks(
            {"task": "multiple_choice", "file": str(questions)},
            gates={"metrics": {"multiple_choice.accuracy": {"min": 0.5}}},
        )
    )
    trained = [path.as_posix() for path in project_sources("steps.train")]
    assert not any("evaluation/tasks" in path for path in trained)
    assert any("evaluation/tasks/pass_at_k" in path.as_posix() for path in project_sources("steps.evaluate"))
