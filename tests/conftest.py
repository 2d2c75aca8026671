"""What every test shares: one thread, fixed seeds, no network, and a store and Metaflow runs of its own."""

import os
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported anywhere, and inherited by every process that a test starts: several processes of several
# threads each fight over few cores, and a sum's rounding depends on how many threads share it.
os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")})
# What infra/env sets, for a pytest started without it.
for _name, _value in runpy.run_path(str(ROOT / "infra" / "environment.py"))["SETTINGS"].items():
    os.environ.setdefault(_name, _value)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub is a mistake: fail at once, not after retries

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the bare machine of infra/gpu_suite.py; no test marked gpu uses it
    pass
else:
    # The same examples in every run; and no deadline: how long an example takes says nothing on a busy machine.
    settings.register_profile("house", derandomize=True, deadline=None, database=None)
    settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, nor a process that it starts, writes to the checkout's store or Metaflow runs."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_STORE", str(home / "store"))
        patch.setenv("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(home))
        patch.setenv("METAFLOW_USER", "tester")
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def isolated_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of an empty store that belongs to this test alone; ``$POSTTRAIN_STORE`` names it."""
    root = tmp_path / "store"
    monkeypatch.setenv("POSTTRAIN_STORE", str(root))
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real tokenizers, templates and conversations: ``$POSTTRAIN_DATA``, else ``../shared/data``."""
    folder = Path(os.environ.get("POSTTRAIN_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (POSTTRAIN_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """case in tests.support.tiny_models -> its folder, written by transformers once per session. Do not change it."""
    from tests.support.tiny_models import write_tiny_model

    root = tmp_path_factory.mktemp("families")

    def folder(case: str) -> Path:
        path = root / case.replace(", ", "-").replace(" ", "-")
        return path if path.is_dir() else write_tiny_model(case, path)

    return folder
