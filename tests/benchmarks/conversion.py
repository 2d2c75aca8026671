"""What the search needs to find families that were taken out of the registry, in attempts and seconds:

    python -m tests.benchmarks.conversion --output tests/benchmarks/results/conversion.json

One family after the other counts as unknown; its model is the tiny one of tests/support/tiny_models with all that is
peculiar to it. Seconds are those of the search itself: proposals, sandbox and gate, without starting the judge.
``OMP_NUM_THREADS`` sets the threads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from posttrain_lib.conversion.convert import convert
from posttrain_lib.conversion.judging import Judge
from posttrain_lib.conversion.protocol import Budget
from posttrain_lib.conversion.sandbox import Limits
from posttrain_lib.conversion.search import SearchAgent
from tests.benchmarks.recording import Recording, argument_parser
from tests.support.tiny_models import CASES, write_tiny_model

#: cases whose parts the search knows: softmax attention, gated feed-forwards and mixtures of them
SEARCHED = [case for case in CASES if not case.startswith(("deepseek", "qwen3_next"))]


def search(case: str, judge: Judge) -> dict[str, Any]:
    """Take one family out and let the search find it."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(case, Path(folder) / "model")
        found = convert(
            model,
            SearchAgent(),
            Path(folder) / "out",
            budget=Budget(60, 1800.0),
            limits=Limits(),
            removed=[CASES[case]["model_type"]],
            running=judge,
            say=lambda _: None,
        )
    outcome = found.outcome
    return {
        "family": found.model_type,
        "found": found.file is not None,
        "attempts": len(outcome.attempts),
        "seconds": round(outcome.seconds, 1),
        "reason": outcome.reason,
        "path": [f"{attempt.note} -> {attempt.summary}" for attempt in outcome.attempts],
    }


def main() -> None:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="*", default=SEARCHED, help="default: all that the search has blocks for")
    options = parser.parse_args()
    recording = Recording()
    found = {}
    with Judge() as judge:
        for case in options.cases:
            found[case] = row = search(case, judge)
            print(
                f"{case:<14}{'found' if row['found'] else 'not found':<11}{row['attempts']:>3} {row['seconds']:>7.1f} s"
            )
    recording.write(options.output, {"families": found})


if __name__ == "__main__":
    main()
