"""The code package that Metaflow keeps with a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from posttrain_lib.adapters.metaflow_runs import every_user

# Behind the one that sets where Metaflow looks.
from metaflow import Run  # isort: skip

#: what a package has at its top that belongs to the checkout's root; the flows' own files lie beside these
_AT_ROOT = ("steps", "posttrain_lib", "configs")


def unpack_code(flow: str, run: str, folder: Path) -> bool:
    """Lay the run's code package out in ``folder`` as a checkout has it; False where the run has none."""
    with every_user():
        found = next((code for step in Run(f"{flow}/{run}") for task in step if (code := task.code) is not None), None)
    if found is None:
        return False
    with found.extract() as unpacked:
        (folder / "flows").mkdir(parents=True)
        for item in Path(unpacked).iterdir():
            if not item.name.startswith("."):
                shutil.move(str(item), folder / item.name if item.name in _AT_ROOT else folder / "flows" / item.name)
    return True
