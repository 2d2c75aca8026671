"""What every benchmark says of its run beside its figures, and how its result file is written."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.lineage.environment import describe_code, describe_environment, describe_hardware

_HARDWARE = ("cpu", "cores", "machine")


def argument_parser(text: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: its module's text as help, and ``--output``."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="result file to write")
    return parser


def load() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


class Recording:
    """Make it before the work: it keeps the load that the machine had then.

    Args:
        packages: whose versions belong to the figures, beside those that always decide numbers.
        hidden: folder that an option named -> the word that stands for it in the recorded command.
    """

    def __init__(self, *packages: str, hidden: Mapping[Path | None, str] | None = None) -> None:
        self.load_at_start = load()
        self._packages = packages
        self._hidden = {str(folder): word for folder, word in (hidden or {}).items() if folder is not None}

    def facts(self) -> dict[str, Any]:
        """Command, date, code, hardware, versions, threads, load."""
        hardware = describe_hardware()
        return {
            "command": self._command(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **describe_code(),
            "hardware": {name: hardware[name] for name in _HARDWARE},
            "versions": describe_environment() | {name: importlib.metadata.version(name) for name in self._packages},
            "threads": _threads(),
            "load": {"at_start": self.load_at_start, "at_end": load()},
        }

    def write(self, output: Path | None, figures: Mapping[str, Any]) -> None:
        """The result file: the facts, then the figures. Without ``output``: nothing, for it was not asked for."""
        if output is not None:
            write_result(output, {**self.facts(), **figures})

    def _command(self) -> str:
        module = sys.modules["__main__"].__spec__
        assert module is not None, "a benchmark is started with python -m"
        return " ".join(["python", "-m", module.name, *(self._hidden.get(word, word) for word in sys.argv[1:])])


def write_result(output: Path, content: Mapping[str, Any]) -> None:
    """JSON; the folder of the real data, which is a path of one machine, becomes ``${POSTTRAIN_DATA}``."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if folder := os.environ.get("POSTTRAIN_DATA"):
        text = text.replace(folder, "${POSTTRAIN_DATA}")
    output.write_text(text + "\n", encoding="utf-8")


def _threads() -> int | None:
    """torch's where it is used, else what the environment sets; None: as many as there are cores."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    stated = os.environ.get("OMP_NUM_THREADS")
    return None if stated is None else int(stated)
