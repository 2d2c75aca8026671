"""Every file under configs/ loads, and the defaults that it leaves out are the models' own."""

from pathlib import Path

import pytest
import yaml

from posttrain_lib.config import RunConfig
from posttrain_lib.config.convert import ConvertConfig, parse_convert_config
from posttrain_lib.config.load import load_run_config
from posttrain_lib.config.retrain import RetrainConfig, parse_retrain_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def load(path: Path) -> RunConfig | ConvertConfig | RetrainConfig:
    """By the model of its recipe."""
    text = path.read_text(encoding="utf-8")
    own = {"convert": parse_convert_config, "retrain": parse_retrain_config}.get(yaml.safe_load(text)["recipe"])
    if own is not None:
        return own(text, where=str(path))
    return load_run_config(path)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs for real data name its folder by a variable; loading a config reads no data."""
    monkeypatch.setenv("POSTTRAIN_DATA", str(tmp_path))


def test_there_are_configs() -> None:
    assert [path for path in CONFIGS if path.name == "default.yaml"]
    assert not [path for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".yaml"]


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_config_loads(path: Path) -> None:
    config = load(path)
    assert config.recipe == path.parent.name


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_resolved_config_loads_again_to_the_same(path: Path, tmp_path: Path) -> None:
    first = load(path)
    written = tmp_path / "resolved.yaml"
    written.write_text(yaml.safe_dump(first.model_dump(mode="json")), encoding="utf-8")
    assert load(written) == first
