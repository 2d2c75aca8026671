"""The chain of steps: which of them a run has."""

from __future__ import annotations

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from steps.pipeline import chain, main, run_until
from tests.support.exported import RAW


@pytest.mark.parametrize("step", ["score_data", "warm_start", "lm_eval", "nothing"])
def test_a_step_that_the_run_does_not_have_is_refused_before_any_is_done(
    step: str, capsys: pytest.CaptureFixture[str], isolated_store: object
) -> None:
    with pytest.raises(ConfigError, match=f"recipe sft has no step {step}"):
        run_until(step, build_run_config(RAW))
    with pytest.raises(SystemExit) as ended:
        main(step, [])
    said = capsys.readouterr()
    assert ended.value.code == 1 and f"has no step {step}" in said.err and "running" not in said.out


def test_lm_eval_is_a_step_of_those_who_ask_for_it() -> None:
    asked = build_run_config({**RAW, "evaluation": {"lm_eval": {"tasks": ["arc_easy"]}}})
    assert [step.name for step in chain(asked)][-1] == "lm_eval"
    assert [step.name for step in chain(build_run_config(RAW))][-1] == "export"
