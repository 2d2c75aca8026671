"""The gate's figures for a tiny model of every family, and the table of them that README carries:

    python -m tests.benchmarks.families --output tests/benchmarks/results/families.json [--readme README.md]

Each model has all that is peculiar to its family switched on and random weights (tests/support/tiny_models.py); its
folder is written by transformers. The table says how far ours is from transformers' float64 in float32 logits, beside
how far its own float32 is, and by how much of its limit the check that came nearest fell short.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain_lib.checkpoint.verify import verify_model
from tests.benchmarks.recording import Recording, argument_parser
from tests.support.tiny_models import CASES, write_tiny_model

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def measure(case: str) -> dict[str, Any]:
    """What the gate says of one model."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(case, Path(folder))
        begun = time.perf_counter()
        report = verify_model(folder)
        seconds = time.perf_counter() - begun
    return {
        "family": report.family,
        "passed": report.passed,
        "parameters": report.parameters,
        "difference": report.difference,
        "noise_floor": report.noise_floor,
        "logit_scale": report.logit_scale,
        "seconds": round(seconds, 2),
        "checks": {
            check.name: {"passed": check.passed, "value": check.value, "limit": check.limit} for check in report.checks
        },
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | checks passed | ours to float64 | its own float32 to float64 |", "| --- | --- | --- | --- |"]
    for case, facts in found.items():
        passed = sum(check["passed"] for check in facts["checks"].values())
        lines.append(
            f"| {case} | {passed} of {len(facts['checks'])} | {facts['difference']:.1e} | {facts['noise_floor']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--readme", type=Path, help="file whose table is replaced, between its two marks")
    options = parser.parse_args()
    recording = Recording()
    found = {}
    for case in CASES:
        found[case] = measure(case)
        print(f"{case}: {'passed' if found[case]['passed'] else 'FAILED'}, {found[case]['seconds']} s", flush=True)
    recording.write(options.output, {"models": found})
    if options.readme:
        before, _, rest = options.readme.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        options.readme.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
    if not all(facts["passed"] for facts in found.values()):
        raise SystemExit("families: the gate does not pass for all of them")


if __name__ == "__main__":
    main()
