"""What the tests of conversion share: what an agent sees of a tiny model, and proposals out of real family files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain_lib.conversion.family_file import ARCHITECTURE, MODEL_TYPE

FAMILIES = Path(__file__).resolve().parents[3] / "posttrain_lib" / "models" / "families"


@pytest.fixture(scope="session")
def as_proposal() -> Callable[[str], str]:
    """file name in models/families -> its text as an agent would write it, without the family's names."""

    def text(name: str) -> str:
        source = (FAMILIES / f"{name}.py").read_text(encoding="utf-8")
        head, _, call = source.rpartition("FAMILY = Family(")
        first, second = call.split('"')[1:4:2]
        return f"{head}FAMILY = Family({call.replace(first, MODEL_TYPE, 1).replace(second, ARCHITECTURE, 1)}"

    return text
