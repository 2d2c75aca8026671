"""What it costs to do recorded runs again, and whether they come out as recorded.

    python -m tests.benchmarks.reproduction SFTFlow/latest DPOFlow/latest GRPOFlow/latest \\
        --output tests/benchmarks/results/reproduction.json

Seconds of getting ready (inputs looked at, code brought back), of the whole run, and of its steps then and now.
"""

from __future__ import annotations

import json
import uuid

from steps import reproduce
from tests.benchmarks.recording import Recording, argument_parser


def main() -> None:
    """Print and, with ``--output``, write the figures of each run."""
    parser = argument_parser(__doc__)
    parser.add_argument("origins", nargs="+", metavar="RUN", help="runs to do again, by name")
    options = parser.parse_args()
    recording = Recording()
    figures = {}
    for origin in options.origins:
        plan = reproduce.begin(origin, uuid.uuid4().hex[:8], moved="", code="recorded", environment="recorded")
        report = reproduce.report(plan, reproduce.carry_out(plan))
        reproduce.clear_away(plan, report, keep=False)
        figures[plan.recorded.flow] = {
            "config": plan.recorded.config["name"],
            "code": plan.code,
            "verdict": report["verdict"],
            "seconds": {name: round(value, 1) for name, value in report["seconds"].items()},
            "verdicts": {step["name"]: step["verdict"] for step in report["steps"]},
        }
    print(json.dumps(figures, indent=1))
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
