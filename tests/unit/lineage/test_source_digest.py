"""The source digest follows imports and registry strings, and nothing else."""

from pathlib import Path

import pytest

from posttrain_lib.lineage.source_digest import project_sources, references_in, source_digest, user_code


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "steps/__init__.py": "",
        "steps/one.py": "from posttrain_lib.a import thing\n\n"
        "if __name__ == '__main__':\n    from steps.other import main\n",
        "steps/other.py": "X = 1\n",
        "posttrain_lib/__init__.py": "",
        "posttrain_lib/a.py": "def thing():\n    from posttrain_lib import b\n    return b\n",
        "posttrain_lib/b.py": "TABLE = {'c': 'posttrain_lib.c:attribute'}\n",
        "posttrain_lib/c.py": "attribute = 1\n",
        "posttrain_lib/unrelated.py": "X = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in project_sources("steps.one", root)}


def test_follows_nested_imports_and_registry_strings(project: Path) -> None:
    assert names(project) == {
        "steps/__init__.py",
        "steps/one.py",
        "posttrain_lib/__init__.py",
        "posttrain_lib/a.py",
        "posttrain_lib/b.py",
        "posttrain_lib/c.py",
    }


@pytest.mark.parametrize(("edited", "changes"), [("posttrain_lib/c.py", True), ("posttrain_lib/unrelated.py", False)])
def test_only_reachable_edits_change_the_digest(project: Path, edited: str, changes: bool) -> None:
    before = source_digest("steps.one", project)
    (project / edited).write_text("attribute = 2  # edited\n")
    assert (source_digest("steps.one", project) != before) is changes


def test_the_train_step_depends_on_its_loss_and_not_on_the_exporter() -> None:
    files = {path.as_posix().split("/posttrain_lib/")[-1] for path in project_sources("steps.train")}
    assert "losses/sft.py" in files
    assert "adapters/vllm_check.py" not in files


def test_a_users_own_module_is_part_of_the_key_and_installed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_own_loss.py").write_text("SCALE = 1.0\n")
    settings = {"loss": "my_own_loss:Loss", "optimizer": {"name": "torch.optim:NAdam"}, "other": ["json:loads", "a: b"]}
    before = user_code(references_in(settings))
    assert list(before) == ["my_own_loss:Loss"]
    (tmp_path / "my_own_loss.py").write_text("SCALE = 0.0\n")
    assert user_code(references_in(settings)) != before


@pytest.mark.parametrize("files", [("__init__.py", "losses.py"), ("losses.py",), ("deep/losses.py",)])
def test_every_file_of_a_users_own_package_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    """A folder without ``__init__.py`` is a package, too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in files:
        path = tmp_path / "my_own_package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("SCALE = 1.0\n")
    reference = f"my_own_package.{files[-1].removesuffix('.py').replace('/', '.')}:Loss"
    before = user_code([reference])
    assert list(before) == [reference]
    path.write_text("SCALE = 0.0\n")
    assert user_code([reference]) != before


def test_an_empty_folder_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_own_folder").mkdir()
    assert user_code(["my_own_folder:thing", "nothing_of_that_name:thing"]) == {}
