"""The text of a proposal: what is refused before anything runs."""

from collections.abc import Callable

import pytest

from posttrain_lib.conversion.family_file import ARCHITECTURE, MODEL_TYPE, objections, with_names

HEAD = "from posttrain_lib.models.families import Family\n"
TAIL = f'\nFAMILY = Family("{MODEL_TYPE}", "{ARCHITECTURE}", None, ())\n'


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_every_way_of_writing_a_family_is_allowed(family: str, as_proposal: Callable[[str], str]) -> None:
    allowed = {f"posttrain_lib.models.families.{name}" for name in ("gemma2", "qwen3_moe", "llama")}
    assert objections(as_proposal(family), allowed) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import os", "imports os"),
        ("from posttrain_lib.checkpoint import verify", "imports from posttrain_lib.checkpoint"),
        (
            "from posttrain_lib.models.families.llama import FAMILY as OTHER",
            "imports from posttrain_lib.models.families.ll",
        ),
        ("from posttrain_lib.models.families import FAMILIES", "something other than Family"),
        ("from . import llama", "imports from ."),
        (
            "from posttrain_lib.models.families.fields import ConfigReader\nConfigReader.finish = print",
            "changes an attribute",
        ),
        ("x = ().__class__.__base__", "private attribute"),
        ("open('x', 'w')", "uses open"),
        ("setattr(Family, 'a', 1)", "uses setattr"),
        ("__builtins__", "uses __builtins__"),
        ("while True: pass", "While"),
        ("def f(:", "SyntaxError"),
        ("x = '" + "a" * 70_000 + "'", "bytes"),
    ],
)
def test_what_a_family_file_has_no_need_of_is_refused(line: str, said: str) -> None:
    found = objections(HEAD + line + TAIL)
    assert found and said in found[0]


def test_a_file_without_a_family_is_refused() -> None:
    assert objections("X = 1\n") == ["there is no FAMILY = Family(...) at the top level"]


def test_the_real_names_come_in_at_the_end() -> None:
    assert 'Family("olmo9", "Olmo9ForCausalLM"' in with_names(TAIL, "olmo9", "Olmo9ForCausalLM")
