"""Triton kernels compiled for a GPU on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compiled_texts(program: str, folder: Path) -> dict[str, str]:
    """Name -> PTX that ``program`` prints as JSON.

    It lies in a file, for Triton reads a kernel's source, and has a cache of its own, so that it is compiled.
    """
    script = folder / "compile_kernels.py"
    script.write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    texts: dict[str, str] = json.loads(done.stdout)
    return texts
