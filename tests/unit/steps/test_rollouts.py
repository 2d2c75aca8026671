"""What recipe grpo adds to training: what of the run file decides its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import load_run_config
from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from steps import rollouts, train
from tests.support.dialogues import tokenizer_of, write_talker


def config(data: dict[str, Any], **grpo: Any) -> RunConfig:
    """The default run file with other fields of two of its sections."""
    raw = load_run_config(PROJECT_ROOT / "configs" / "grpo" / "default.yaml", []).model_dump(
        mode="json", exclude_unset=True
    )
    return RunConfig.model_validate({**raw, "data": {**raw["data"], **data}, "grpo": {**raw["grpo"], **grpo}})


@pytest.mark.parametrize(
    "data", [{"template_date": "2031-05-06"}, {"template_kwargs": {"tools_in_user_message": False}}]
)
def test_the_templates_variables_decide_where_training_renders(data: dict[str, Any]) -> None:
    """An environment's tools and turns; prompts without any are rendered before, and come in as they are."""
    calculator = {"name": "calculator"}
    assert rollouts.settings(config(data)) == rollouts.settings(config({}))
    with_tools = [rollouts.settings(config(each, environment=calculator)) for each in (data, {})]
    assert with_tools[0] != with_tools[1]


def test_a_run_that_is_watched_by_other_prompts_is_another(tmp_path: Path) -> None:
    """Which checkpoint is the best is told by them: half of a run's looks at other prompts would pick it. How often,
    and by how many draws besides, may change in the middle."""
    found = config({}).grpo
    assert found is not None
    held_out = found.held_out.model_dump()
    begun = train.work_settings(config({}))
    for name, value in {"every_steps": 3, "samples": 1}.items():
        assert train.work_settings(config({}, held_out={**held_out, name: value})) == begun, name
    assert train.work_settings(config({}, held_out={**held_out, "prompts": 7})) != begun


@pytest.mark.parametrize("text", ["<|im_end|>", "Done.<|im_end|>"])
def test_a_stop_string_that_no_text_has_is_refused(tmp_path: Path, text: str) -> None:
    """Control tokens are not in an answer's text."""
    tokenizer = tokenizer_of(write_talker(tmp_path / "model"))
    for strings in ([text], ["</end>", text]):
        grpo = config({}, rollout={"stop_strings": strings}).grpo
        assert grpo is not None
        with pytest.raises(ConfigError, match="no answer would end"):
            rollouts.sampling(grpo, tokenizer)
    grpo = config({}, rollout={"stop_strings": ["</end>", "\n\n"]}).grpo
    assert grpo is not None
    assert rollouts.sampling(grpo, tokenizer).stop_strings == ("</end>", "\n\n")


def test_a_reward_model_among_the_graders_comes_in_by_its_content(tmp_path: Path) -> None:
    """One that is replaced in its place gives other grades: what it graded before is not taken for its own."""
    (tmp_path / "weights").write_text("one")
    graded = config(
        {}, rewards=[{"name": "exact"}, {"name": "model", "title": "taste", "options": {"folder": str(tmp_path)}}]
    )
    found = rollouts.judges(graded)
    assert [*found] == ["grader:taste:folder"] and found["grader:taste:folder"].uri == str(tmp_path)
    (tmp_path / "weights").write_text("two")
    assert rollouts.judges(graded)["grader:taste:folder"].digest != found["grader:taste:folder"].digest
    assert rollouts.judges(config({})) == {}


def reads_its_words(answer: Any, words: str = "", limit: float = 1.0) -> float:
    """A grader of one's own that reads a file."""
    return min(limit, float(answer.text in Path(words).read_text(encoding="utf-8")))


reads_its_words.reads = ("words",)  # type: ignore[attr-defined]


def test_what_a_grader_of_ones_own_says_that_it_reads_comes_in(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("yes")
    name = f"{__name__}:reads_its_words"
    graded = config({}, rewards=[{"name": name, "options": {"words": str(tmp_path / "words.txt"), "limit": 0.5}}])
    found = rollouts.judges(graded)
    (tmp_path / "words.txt").write_text("no")
    assert [*found] == ["grader:reads_its_words:words"] and rollouts.judges(graded) != found
    assert rollouts.judges(config({}, rewards=[{"name": name}])) == {}  # its own default


def test_a_reward_model_that_is_not_there_is_refused() -> None:
    gone = config({}, rewards=[{"name": "model", "options": {"folder": "/gone/model"}}])
    with pytest.raises(ConfigError, match=r"does not exist.*\n.*grpo.rewards: model"):
        rollouts.judges(gone)
