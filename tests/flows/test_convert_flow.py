"""The conversion flow as a user meets it: real Metaflow runs on tiny models, a known family and an unknown one."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "convert_flow.py"
UNKNOWN = 'conversion.treat_as_unknown=["olmo2"]'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the module's store and Metaflow runs."""
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    return write_tiny_model("olmo2", home / "model")


def flow(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "POSTTRAIN_STORE": str(home / "store"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, str(FLOW), "--no-pylint", *arguments],
        env={**os.environ, **settings},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


def card(home: Path) -> str:
    """What the report shows."""
    target = home / "report.html"
    done = flow(home, "card", "get", "report", str(target), "--id", "report")
    assert done.returncode == 0, done.stdout
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', target.read_text())
    assert data is not None
    return base64.b64decode(data.group(1)).decode()


def printed(output: str, name: str) -> Path:
    """The path that the flow's last step prints under a name."""
    found = re.search(rf"\] {name} +(\S+)", output)
    assert found is not None, output
    return Path(found.group(1))


def test_a_known_family_is_verified(home: Path, model: Path) -> None:
    done = flow(home, "run", "--model", str(model))
    assert done.returncode == 0, done.stdout
    assert "propose_family: running" not in done.stdout
    assert printed(done.stdout, "model") == model
    assert printed(done.stdout, "verification").is_file()
    shown = card(home)
    assert "convert: verified" in shown and "logits, float32" in shown
    again = flow(home, "run", "--model", str(model))
    assert "convert_model: reused" in again.stdout


def test_an_unknown_family_is_proposed_for_review(home: Path, model: Path) -> None:
    done = flow(home, "run", "--model", str(model), "--set", UNKNOWN)
    assert done.returncode == 0, done.stdout
    assert "convert_model: running" not in done.stdout
    family, test = printed(done.stdout, "family"), printed(done.stdout, "test")
    assert family.parts[-4:] == ("posttrain_lib", "models", "families", "olmo2.py")
    assert 'Family("olmo2", "Olmo2ForCausalLM"' in family.read_text()
    assert "verify_model" in test.read_text()
    attempts = printed(done.stdout, "attempts")
    assert (attempts / "001" / "attempt.json").is_file() and (attempts / "brief.json").is_file()
    shown = card(home)
    for said in ("Attempts of the agent `search`", "norms, bfloat16", "Proposed, for review", "def read_config"):
        assert said in shown
    # Nothing was adopted: the project's own file is what it was, and is not what was proposed.
    assert (ROOT / "posttrain_lib" / "models" / "families" / "olmo2.py").read_text() != family.read_text()


def test_a_budget_that_ends_fails_the_run_and_keeps_the_attempts(home: Path, model: Path) -> None:
    done = flow(home, "run", "--model", str(model), "--set", f"{UNKNOWN},conversion.max_attempts=1")
    assert done.returncode != 0
    assert "no definition of the architecture was found" in done.stdout
    assert "the budget of 1 attempts is used up" in done.stdout
    assert "Traceback" not in done.stdout
    assert (printed(done.stdout, "attempts") / "001" / "proposal.py").is_file()
    assert "convert: not verified" in card(home)


def test_mistakes_are_said_plainly(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    for arguments, said in (
        (("--model", str(tmp_path)), "names no model_type"),
        (("--model", str(tmp_path / "nowhere")), "does not exist"),
        (("--set", "conversion.max_atempts=3"), "unknown key"),
        (("--set", 'conversion.agent={"kind": "llm"}'), "exactly one of 'base_url' and 'command'"),
    ):
        done = flow(home, "run", *arguments)
        assert done.returncode != 0
        assert said in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
