"""From the command to the first training step, each second accounted for.

    python -m tests.benchmarks.startup --output tests/benchmarks/results/startup.json

A tiny job, so that what is left is the start itself: one process, one and two Ray workers, two ranks of torchrun.
Moments come from the pulses that ranks and driver write (see posttrain_lib.compute.heart), against the moment the
process was started; a part lasts until the next one begins. With ``--flow`` also ``flows/sft_flow.py run`` on a tiny
run file with an empty store: seconds at which each step begins and ends, to the first step of training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.recording import Recording, argument_parser
from tests.support.launched import ROOT, command

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one process": ({}, []),
    "one Ray worker": ({"launcher": "ray"}, []),
    "two Ray workers": ({"devices_per_node": 2}, []),
    "two ranks of torchrun": ({"devices_per_node": 2}, ["--nproc-per-node", "2"]),
}
TRAIN = {"steps": 2, "evaluate_every_steps": 2}
#: the pulse's word for what comes right behind the first step; no checkpoint or evaluation is due there
_BEHIND_FIRST_STEP = ("waiting for data", "checkpoint", "held-out loss")


def parts(started: float, driver: list[tuple[str, float]], rank: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each part, in order; their sum is the time to the end of the first step."""
    moments = [("process and imports of the driver", started), *driver, *rank]
    first = next(place for place, (phase, _) in enumerate(moments) if phase == "training step")
    end = next(at for phase, at in moments[first + 1 :] if phase in _BEHIND_FIRST_STEP)
    found: dict[str, float] = {}
    for (phase, at), (_, until) in zip(moments[: first + 1], [*moments[1 : first + 1], ("", end)], strict=True):
        found[phase] = round(found.get(phase, 0.0) + until - at, 3)
    return {**found, "in all": round(end - started, 3)}


def measure(compute: dict[str, Any], torchrun: list[str]) -> dict[str, float]:
    """One start of the job in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        from tests.oracles.tiny_job import make_job, tiny_config

        make_job(Path(folder), tiny_config())  # model and data are there before the clock starts
        arguments = command(Path(folder), compute, TRAIN, torchrun=torchrun)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = time.time()
        subprocess.run(arguments, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
        ranks = Path(folder) / "work" / "ranks"
        driver = json.loads((ranks / "driver.json").read_text())["timeline"] if (ranks / "driver.json").exists() else []
        return parts(started, driver, json.loads((ranks / "rank-0.json").read_text())["timeline"])


def flow_moments() -> dict[str, float]:
    """Seconds from ``run`` to what the flow says, in an empty store; up to the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "POSTTRAIN_STORE": f"{folder}/store",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": folder,
        }
        flow, config = ROOT / "flows/sft_flow.py", ROOT / "tests/flows/tiny.yaml"
        arguments = [sys.executable, str(flow), "--no-pylint", "--config", str(config), "run"]
        found: dict[str, float] = {}
        started = time.time()
        with subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said = line.rpartition("] ")[2].strip() if "[" in line else line.strip()
                name, _, what = said.partition(": ")
                if what.startswith(("running", "done")):
                    found.setdefault(f"{name} {what.split()[0].rstrip(',')}", round(time.time() - started, 2))
                if "1/8" in line or "2/8" in line:
                    found.setdefault("a training step reported", round(time.time() - started, 2))
        if process.returncode:
            raise RuntimeError(f"the flow ended with {process.returncode}")
        return found


def main() -> None:
    """Print and, with ``--output``, write the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="starts of each case; the fastest counts")
    parser.add_argument("--case", choices=list(CASES), action="append", help="default: all")
    parser.add_argument("--flow", action="store_true", help="also the flow")
    options = parser.parse_args()
    recording = Recording("ray", "metaflow", "pydantic")
    figures: dict[str, Any] = {"seconds": {}}
    for name in options.case or CASES:
        runs = [measure(*CASES[name]) for _ in range(options.repeats)]
        figures["seconds"][name] = min(runs, key=lambda run: run["in all"])
        print(name, json.dumps(figures["seconds"][name], indent=1), flush=True)
    if options.flow:
        figures["flow, seconds since run"] = flow_moments()
        print(json.dumps(figures["flow, seconds since run"], indent=1), flush=True)
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
