"""The whole way: an unknown architecture, an agent, the sandbox, the judge."""

import ast
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.convert import Conversion, convert, narrow_windows
from posttrain_lib.conversion.family_file import FamilyFile, objections
from posttrain_lib.conversion.family_test import test_text as text_of_test
from posttrain_lib.conversion.family_test import tiny_case
from posttrain_lib.conversion.judging import Judge
from posttrain_lib.conversion.protocol import Attempt, Budget, GiveUp
from posttrain_lib.conversion.sandbox import Limits, run_proposal
from posttrain_lib.conversion.search import SearchAgent
from posttrain_lib.conversion.search_space import Space
from tests.support.tiny_models import CASES

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits(seconds=20.0, memory_gib=0.5, gate_seconds=120.0)
#: cases that the search brings back; the first two in the plain run, where the gate has to correct the first guess
QUICK = ("olmo2", "mixtral")
SLOW = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"),
    *("olmo3", "smollm3", "granite", "glm4", "qwen3_moe", "olmoe", "gpt_oss"),
)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """One judging process for all tests: it takes seconds to start."""
    with Judge(seconds=120.0) as running:
        yield running


class Scripted:
    """An agent that proposes what it was given, and then gives up."""

    name, named = "scripted", False

    def __init__(self, *texts: str) -> None:
        self._texts, self.seen = list(texts), list[Attempt]()

    def propose(self, brief: Brief, history: Sequence[Attempt]) -> FamilyFile | GiveUp:
        self.seen = list(history)
        return FamilyFile(self._texts.pop(0)) if self._texts else GiveUp("nothing is left")


def search(case: str, folder: Path, out: Path, judge: Judge) -> Conversion:
    unknown, budget = [CASES[case]["model_type"]], Budget(40, 900.0)
    return convert(folder, SearchAgent(), out, budget=budget, limits=LIMITS, removed=unknown, running=judge)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_search_finds_a_family_that_was_taken_out(
    case: str, family_folder: Callable[[str], Path], tmp_path: Path, judge: Judge
) -> None:
    found = search(case, family_folder(case), tmp_path, judge)
    assert found.file is not None, [attempt.summary for attempt in found.outcome.attempts]
    assert found.report is not None and found.report["passed"]
    for number in range(1, len(found.outcome.attempts) + 1):
        assert (tmp_path / "attempts" / f"{number:03d}" / "proposal.py").is_file()
    # What a reviewer gets: formatted, clean, under the family's own name, built on no other family.
    assert objections(found.file) == []
    assert f'Family("{CASES[case]["model_type"]}"' in found.file
    path = tmp_path / "proposed.py"
    path.write_text(found.file)
    checks = (
        ["ruff", "format", "--check", "--config", "pyproject.toml"],
        ["ruff", "check", "--config", "pyproject.toml"],
        ["mypy"],
    )
    for command in checks:
        done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
def test_the_test_of_a_proposal_passes_in_the_project(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The test file that comes with a proposal is run as it would be in the project."""
    case = json.loads((family_folder("olmo2") / "config.json").read_text())
    path = tmp_path / "test_proposed.py"
    path.write_text(text_of_test("olmo2", tiny_case(case)))
    ast.parse(path.read_text())
    done = subprocess.run(["pytest", "-q", "-c", "pyproject.toml", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tiny_case_keeps_what_is_on() -> None:
    config = {
        "model_type": "x",
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "attn_logit_softcapping": 50.0,
        "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096},
    }
    case = tiny_case(config)
    assert case["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    assert (case["sliding_window"], case["head_dim"], case["num_experts"], case["num_experts_per_tok"]) == (9, 16, 6, 2)
    assert case["num_key_value_heads"] == 4
    assert case["rope_parameters"]["original_max_position_embeddings"] == 32
    assert case["attn_logit_softcapping"] == 50.0


#: what a proposal may try, in front of a definition that is wrong in its norms; and whether it gets that far
CHEATS = {
    "limits": ("import posttrain_lib.checkpoint.verify_documents as gate\ngate.NOISE_FACTOR = 1e9", False),
    "transformers": ("import transformers\ntransformers.AutoModelForCausalLM = None", False),
    "the class": ("import posttrain_lib.models.spec as spec\nspec.NormConfig.late_cast = True", True),
    "a gate of its own": (
        "import sys, types\ngate = types.ModuleType('gate')\ngate.verify_model = lambda *_: True\n"
        "sys.modules['posttrain_lib.checkpoint.verify'] = gate",
        True,
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_proposal_cannot_reach_the_verdict(
    cheat: str, judge: Judge, family_folder: Callable[[str], Path], as_proposal: Callable[[str], str]
) -> None:
    """The check of the text is off. Some cheats the sandbox stops; the others change a process that judges nothing."""
    line, runs = CHEATS[cheat]
    folder = family_folder("olmo2")
    config = json.loads((folder / "config.json").read_text())
    wrong = as_proposal("olmo2").replace("late_cast=True", "late_cast=False")
    text = wrong.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{line}\n")
    assert objections(text), "the check of the text would have refused it"
    read = run_proposal(text, config, limits=Limits(seconds=60.0, memory_gib=8.0), check_text=False)
    if not runs:
        assert "PermissionError" in str(read.error)
        return
    assert read.family is not None, read.error
    assert judge.verify(folder, read.family).outcome == "differs"


def test_a_window_wider_than_the_documents_does_not_hide(
    family_folder: Callable[[str], Path], tmp_path: Path, as_proposal: Callable[[str], str], judge: Judge
) -> None:
    """A proposal without the window computes what the reference computes, in every document that fits into it."""
    folder = tmp_path / "wide"
    shutil.copytree(family_folder("mistral"), folder)
    content = json.loads((folder / "config.json").read_text()) | {"sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps(content))
    agent = Scripted(
        as_proposal("mistral").replace("window=fields.window(default=4096)", "window=fields.window() and None")
    )
    budget, out = Budget(3, 600.0), tmp_path / "out"
    found = convert(folder, agent, out, budget=budget, limits=LIMITS, removed=["mistral"], running=judge)
    assert found.file is None
    assert [attempt.outcome for attempt in agent.seen] == ["differs"]
    assert agent.seen[0].report is not None
    assert agent.seen[0].report["first_wrong_module"] == "layers.0.attention"


def test_folders_are_narrowed_only_where_they_have_wide_windows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    content = {"sliding_window": 4096, "max_window_layers": 28, "model_type": "x"}
    target = narrow_windows(tmp_path, content, tmp_path / "n")
    assert json.loads((target / "config.json").read_text()) == content | {"sliding_window": 9}
    assert narrow_windows(tmp_path, {"sliding_window": None}, tmp_path / "m") == tmp_path


def test_an_architecture_that_the_blocks_cannot_express_is_given_up_with_the_reason(
    family_folder: Callable[[str], Path], tmp_path: Path, judge: Judge
) -> None:
    found = search("qwen3_next", family_folder("qwen3_next"), tmp_path, judge)
    assert found.file is None
    assert "linear_attn" in str(found.outcome.reason)
    assert (tmp_path / "attempts" / "brief.json").is_file()


class Backwards(SearchAgent):
    """The search from the unlikeliest reading of everything: what it finds then, it owes to the gate."""

    def space_of(self, brief: Brief) -> Space:
        space = super().space_of(brief)
        turned = tuple(dataclasses.replace(choice, values=choice.values[::-1]) for choice in space.choices)
        return dataclasses.replace(space, choices=turned)


@pytest.mark.slow
def test_the_gate_leads_the_search_from_the_unlikeliest_guess(
    family_folder: Callable[[str], Path], tmp_path: Path, judge: Judge
) -> None:
    folder, budget = family_folder("llama"), Budget(150, 1200.0)
    found = convert(folder, Backwards(), tmp_path, budget=budget, limits=LIMITS, removed=["llama"], running=judge)
    assert found.file is not None
    assert len(found.outcome.attempts) > 10
