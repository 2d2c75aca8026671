"""What this device reaches on a large product and on a copy: the limits that every other part is held against.

Each part measures both again in its own process; this one is there for a run of nothing else.
"""

from __future__ import annotations

from tests.benchmarks.gpu.common import Part, ceilings, main


def run(part: Part) -> None:
    """One case."""
    part.run(iter([("ceilings", lambda: ceilings(part))]))


if __name__ == "__main__":
    main(run, __doc__)
