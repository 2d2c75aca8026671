"""Size, docstrings, defaults in one place, and nothing about one machine. Lists of exceptions may only shrink."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES = 500
FUNCTION_LINES = 80

#: file, or file:function -> its length in lines. Shorten the code, then the entry; never add one.
LONGER: dict[str, int] = {}

#: a folder of one machine, at the start of a path
MACHINE_PATH = re.compile(r"(?<![\w.>})~])/(?:work|tmp|root|home|Users)(?=/|\b)")
#: hosts of package indexes: which one a machine uses is that machine's matter
INDEX_HOST = re.compile(
    r"(?i)\b(?:pypi\.(?:org|io)|pythonhosted|download\.pytorch|anaconda\.(?:org|com)|wheels\.vllm)\b"
)
#: file -> pattern that it may contain, with the reason
MAY_CONTAIN = {"tests/house/test_taste.py": "the patterns themselves"}


def tracked() -> list[Path]:
    """Files that belong to the project: what git tracks or would add; skips outside a checkout."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are the project's is not known")
    return [path for path in (ROOT / line for line in listed.splitlines()) if path.is_file()]


def python_files() -> list[Path]:
    folders = ("posttrain_lib", "steps", "flows", "infra", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lengths() -> Iterator[tuple[str, int, int]]:
    """(what, its lines, the limit) of every file and function."""
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        yield name(path), len(text.splitlines()), FILE_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{name(path)}:{node.name}", node.end_lineno - node.lineno + 1, FUNCTION_LINES


def test_files_and_functions_are_short() -> None:
    found = {what: length for what, length, limit in lengths() if length > limit}
    grown = {what: length for what, length in found.items() if length > LONGER.get(what, 0)}
    assert not grown, f"over {FILE_LINES} lines (files) or {FUNCTION_LINES} (functions): {grown}"
    assert found == LONGER, "shorter by now: bring LONGER up to date, so that it cannot grow again"


@pytest.mark.parametrize("folder", ["posttrain_lib", "steps", "flows", "infra"])
def test_every_module_says_what_it_is(folder: str) -> None:
    silent = [name(path) for path in (ROOT / folder).rglob("*.py") if not says_something(path)]
    assert not silent


def says_something(path: Path) -> bool:
    return bool(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("pattern", [MACHINE_PATH, INDEX_HOST], ids=["machine paths", "index hosts"])
def test_nothing_names_one_machine(pattern: re.Pattern[str]) -> None:
    found = []
    for path in tracked():
        if name(path) in MAY_CONTAIN:
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{name(path)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(lines, 1)
            if pattern.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    for text in ("cd /home/me/x", "'/tmp/x'", "open(/work)"):
        assert MACHINE_PATH.search(text), text
    for text in ("<root>/tmp/ results", "{home}/work/x", "https://x.example/home/", "a/root/b", "/rooted"):
        assert not MACHINE_PATH.search(text), text
    assert INDEX_HOST.search("https://files.pythonhosted.org/x")


def test_defaults_live_in_the_config_models() -> None:
    """Code that reads a config takes what is there: ``getattr(config, "x", 3)`` would be a second default."""
    found = []
    for path in python_files():
        if path.is_relative_to(ROOT / "tests") or path.is_relative_to(ROOT / "infra"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, reads = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            if called == "getattr" and len(node.args) == 3 and re.search(r"(?i)\b(?:cfg|config|job)\b", reads):
                found.append(f"{name(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)
