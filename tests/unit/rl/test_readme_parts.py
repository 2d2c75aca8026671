"""What README shows as parts of one's own are such: named as a run file names them, and used as a run does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.rl.advantages import rule_of
from posttrain_lib.rl.constrain import ConstraintSpec, make_constrain
from posttrain_lib.rl.environments.base import EnvironmentSpec, Said, checked, environment_maker
from posttrain_lib.rl.prompts import RolloutPrompt
from tests.support.dialogues import tokenizer_of, write_talker

README = Path(__file__).parents[3] / "README.md"
PROMPT = RolloutPrompt((1,), (), "7", "mine", "rows:1")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    (code,) = [found for found in blocks if found.startswith("# my_rl.py")]
    (tmp_path / "my_rl.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rl"


def test_the_advantage_rule(module: str) -> None:
    rewards, ones = np.array([0.0, 1.0, 3.0]), np.ones(3, dtype=np.int64)
    assert rule_of(f"{module}:over_median")(rewards, ones, ones).tolist() == [-1.0, 0.0, 2.0]


def test_the_constraint(module: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(write_talker(tmp_path / "model"))
    words = make_constrain(ConstraintSpec(f"{module}:yes_or_no"), tokenizer)(PROMPT)
    assert words is not None
    yes, no = (tokenizer.encode(word).ids.tolist() for word in ("yes", "no"))
    assert words.after([]).tolist() == sorted({yes[0], no[0]})
    assert words.after(yes).tolist() == [tokenizer.eos_id]


def test_the_environment(module: str) -> None:
    guess = environment_maker(EnvironmentSpec(f"{module}:Guess"))()
    guess.reset(PROMPT, seed=0)
    again, over = (checked(guess.step(text), guess.roles) for text in ("8", " 7\n"))
    assert list(again.messages) == [Said("user", "No. Guess again.")] and not again.done
    assert over.done and over.info == {"guessed": True}
