"""Every family, loaded over two processes, computes what one does: logits and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain_lib.checkpoint.verify_sharded import TwoProcesses, check_sharded
from posttrain_lib.models.families import spec_from_folder
from tests.support.tiny_models import CASES


@pytest.fixture(scope="module")
def processes() -> Iterator[TwoProcesses]:
    with TwoProcesses() as two:
        yield two


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_ranks_are_one(case: str, family_folder: Callable[[str], Path], processes: TwoProcesses) -> None:
    folder = family_folder(case)
    checks = check_sharded(spec_from_folder(folder), folder=folder, processes=processes)
    assert [check.name for check in checks] == ["sharded = single, fsdp", "sharded = single, tensor parallel"]
    for check in checks:
        assert isinstance(check.value, float), f"every one of these can be cut in two, but: {check.value}"
        assert check.passed, check
