"""The loss that README shows as an example is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from posttrain_lib.losses.contract import check_loss

README = Path(__file__).parents[3] / "README.md"


def test_the_example_keeps_the_contract() -> None:
    code = next(
        found for found in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S) if "Loss)" in found
    )
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    check_loss(names["FocalLoss"](gamma=1.5))
