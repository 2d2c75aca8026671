"""The process in which a proposal runs: text and config.json in, plain data out. Started by ``sandbox``.

    python -I -B <this file> <project root> <own folder>

reads a request (JSON) on standard input and writes the answer (JSON) to what was standard output. The proposal gets
neither: it could forge the answer, and gains nothing by it, for the answer is data that another process judges.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer_to(request: dict[str, Any], folder: Path, started: Callable[[], Any]) -> dict[str, Any]:
    """{"family": data, "layers": [...]} of a proposal, or {"error": text, "layers": [...]}; its time begins with
    ``started``."""
    import types

    import posttrain_lib.models.families.shared as shared
    from posttrain_lib.conversion.confine import confine, limit_resources
    from posttrain_lib.conversion.spec_data import FamilyData, to_data
    from posttrain_lib.models.families import Family
    from posttrain_lib.models.families.fields import ConfigReader

    for name in request["removed"]:
        sys.modules[name] = None  # type: ignore[assignment]  # "import name" now raises ModuleNotFoundError
    limit_resources(seconds=request["seconds"], memory_bytes=request["memory_bytes"])
    layers = confine(folder)
    started()
    module = types.ModuleType("proposal")
    module.__dict__["__file__"] = "proposal.py"
    try:
        # dataclasses looks a class's module up.
        sys.modules["proposal"] = module
        exec(compile(request["text"], "proposal.py", "exec"), module.__dict__)
        family = module.__dict__["FAMILY"]
        if not isinstance(family, Family):
            raise TypeError(f"FAMILY is a {type(family).__name__}, not a Family")
        fields = ConfigReader(request["config"])
        config = family.read_config(fields)
        fields.finish()
        plan = shared.sharding_plan(family.rules) if family.sharding_plan is None else dict(family.sharding_plan)
        left = family.left_alone and family.left_alone.replace("{layers}", str(config.num_hidden_layers))
        data = to_data(FamilyData(config, tuple(family.rules), plan, left))
        return {"family": data, "layers": layers}
    except MemoryError:
        return {"error": "MemoryError: the proposal wants more memory than it may have", "layers": layers}
    except BaseException as error:  # whatever a proposal raises, SystemExit too, is its answer
        return {"error": said(error), "layers": layers}


def said(error: BaseException) -> str:
    """The error with the proposal's own lines: those of the project are not its author's to mend."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "proposal.py"]
    place = f"line {frames[-1].lineno} of the proposal: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"[:4000]


def main() -> None:
    """Answer the one request."""
    root, folder = sys.argv[1:3]
    sys.path.insert(0, root)
    request = json.loads(sys.stdin.buffer.read())
    # What a proposal prints goes nowhere.
    reply, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    answer = answer_to(request, Path(folder), lambda: os.write(reply, b" "))
    with os.fdopen(reply, "wb") as out:
        out.write(json.dumps(answer).encode())
    os._exit(0)  # no handler that the proposal left behind


if __name__ == "__main__":
    main()
