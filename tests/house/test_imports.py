"""Import directions: flows -> steps -> posttrain_lib, hosts at the edge, light parts light.

Two proofs. The first reads the source, functions included; imports under ``TYPE_CHECKING`` do not run and do not
count. The second imports every module of a layer in a process where what the layer must do without is missing.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"ray", "verl", "vllm", "metaflow", "wandb", "mlflow", "tensorboard"}
PROJECT = {"flows", "steps", "posttrain_lib", "posttrain_flow", "training_flow"}
DATA = {
    "numpy",
    "numba",
    "tokenizers",
    "gigatoken",
    "transformers",
    "pyarrow",
    "fsspec",
    "datasets",
    "huggingface_hub",
    "jinja2",
}
CORE = {"numpy", "torch", "safetensors", "transformers", "pyarrow"}
CORE_PACKAGES = ("ops", "models", "losses", "optim", "parallel", "checkpoint", "training", "evaluation")

#: the longest prefix of a module's path (from posttrain_lib/ on) names what it may import besides the standard
#: library and the project's own lower layers
MAY_IMPORT: dict[str, set[str]] = {
    "": {"numpy"},
    "schema": {"numpy"},
    "config": {"numpy", "pydantic", "yaml"},
    "lineage": {"numpy", "fsspec"},
    "data": DATA,
    "data/collate.py": {"numpy", "torch"},
    "embedded": DATA,
    **{package: CORE for package in CORE_PACKAGES},
    **{f"ops/{name}_triton": {"torch", "triton"} for name in ("head", "norm", "rope", "swiglu")},
    "rl": CORE,
    "rl/rewards": CORE,
    "rl/rewards/maths": {"math_verify"},
    # asks transformers, inside functions, what an unknown architecture does
    "conversion": CORE | {"huggingface_hub"},
    "compute": {"numpy", "torch"},
    "compute/ray_": {"numpy", "torch", "ray"},
    "tracking": {"rich"},
    "adapters": {"numpy"},
    "adapters/hf_reference": CORE | {"huggingface_hub"},
    "adapters/metaflow_": {"metaflow"},
    "adapters/tracker_mlflow": {"mlflow"},
    "adapters/tracker_tensorboard": {"torch"},
    "adapters/tracker_wandb": {"wandb"},
    "adapters/vllm_": {"numpy", "torch", "transformers", "vllm"},
    "adapters/verl_": {"numpy", "torch", "verl", "tensordict", "ray"},
    # torch inside functions only: the import without it is tested below
    "steps": {"numpy", "torch", "yaml", "rich", "huggingface_hub"},
    "flows": {"metaflow"},
}

#: project packages that a layer must not import, because they lie above it or need more than it may
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "posttrain_lib": {"steps", "flows"},
    "steps": {"flows"},
    "posttrain_lib/schema": {"posttrain_lib.config", "posttrain_lib.data", "posttrain_lib.lineage"},
    "posttrain_lib/config": {"posttrain_lib.data", "posttrain_lib.lineage", "posttrain_lib.adapters"},
    **{
        f"posttrain_lib/{package}": {"posttrain_lib.config", "posttrain_lib.compute", "posttrain_lib.lineage.store"}
        for package in ("data", *CORE_PACKAGES, "rl")
    },
}


@dataclass(frozen=True)
class Imported:
    """One import statement: what it names, and where."""

    name: str
    line: int
    inside_function: bool


def imports_of(tree: ast.AST) -> Iterator[Imported]:
    """Every import that can run, functions included."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Imported]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(alias.name, node.lineno, inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; the house imports by full name"
            for alias in node.names:
                yield Imported(f"{node.module}.{alias.name}", node.lineno, inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def sources() -> list[Path]:
    return sorted(path for folder in ("posttrain_lib", "steps", "flows") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def allowed(path: str) -> set[str]:
    key = path.removeprefix("posttrain_lib/")
    prefixes = [
        prefix for prefix in MAY_IMPORT if not prefix or key == prefix or key.startswith((f"{prefix}/", prefix))
    ]
    return MAY_IMPORT[max(prefixes, key=len)]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    wrong = []
    for item in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
        top = item.name.split(".")[0]
        where = f"{relative(path)}:{item.line} imports {item.name}"
        if top not in sys.stdlib_module_names | PROJECT | allowed(relative(path)):
            wrong.append(f"{where}: not in this layer (see MAY_IMPORT)")
        for layer, packages in MUST_NOT_IMPORT.items():
            if relative(path).startswith(f"{layer}/") and any(is_within(item.name, package) for package in packages):
                wrong.append(f"{where}: that layer is above this one")
        if (
            top == "transformers"
            and not item.inside_function
            and "adapters" not in path.parts
            and "data" not in path.parts
        ):
            wrong.append(f"{where}: transformers takes seconds to import; do it inside the function that needs it")
    assert not wrong, "\n".join(wrong)


def modules(*places: str, but: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of all modules under the given folders or files."""
    found: list[str] = []
    for place in places:
        base = ROOT / place
        for path in sorted(base.rglob("*.py")) if base.is_dir() else [base]:
            if relative(path) not in but:
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return found


HEAVY = HOSTS | {"torch"}
LAYERS: dict[str, tuple[list[str], set[str]]] = {
    "schema": (
        modules("posttrain_lib/__init__.py", "posttrain_lib/errors.py", "posttrain_lib/schema"),
        HEAVY | {"pydantic", "yaml", "transformers", "tokenizers", "pyarrow", "fsspec", "safetensors"},
    ),
    "config": (modules("posttrain_lib/config"), HEAVY | {"transformers", "tokenizers", "pyarrow", "safetensors"}),
    "lineage": (modules("posttrain_lib/lineage"), HEAVY | {"pydantic", "transformers"}),
    "data": (
        modules("posttrain_lib/data", "posttrain_lib/embedded", but=("posttrain_lib/data/collate.py",)),
        HEAVY | {"pydantic", "yaml"},
    ),
    "core": (
        modules(*(f"posttrain_lib/{package}" for package in CORE_PACKAGES), "posttrain_lib/data"),
        HOSTS | {"pydantic", "yaml", "datasets"},  # fsspec comes with torch
    ),
    # a sink imports its host when it is opened
    "tracking": (
        modules(
            "posttrain_lib/tracking",
            *(f"posttrain_lib/adapters/tracker_{host}.py" for host in ("mlflow", "tensorboard", "wandb")),
        ),
        HEAVY | {"pydantic", "rich", "transformers"},
    ),
    # A grading process is started often, and in numbers: it takes what its grader needs.
    "rewards": (
        modules("posttrain_lib/rl/rewards", but=("posttrain_lib/rl/rewards/model.py",)),
        HEAVY | {"pydantic", "transformers", "tokenizers", "sympy", "math_verify"},
    ),
    "launch": (modules("posttrain_lib/compute/launch.py"), HOSTS | {"pydantic"}),
    # What a flow imports before its first task starts; Metaflow itself imports the flow file once per task and card.
    "steps": (modules("steps"), HEAVY | {"transformers"}),
}

IMPORT_WITHOUT = """
import importlib, json, sys
modules, missing = json.loads(sys.argv[1])
sys.modules.update({name: None for name in missing})  # "import name" now raises ModuleNotFoundError
for name in modules:
    importlib.import_module(name)
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_without_what_it_must_do_without(layer: str) -> None:
    names, missing = LAYERS[layer]
    assert names
    argument = json.dumps([names, sorted(missing)])
    command = [sys.executable, "-c", IMPORT_WITHOUT, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_walk_sees_imports_in_functions_but_not_for_types() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\ndef f():\n    from vllm import LLM\n"
    found = {(item.name, item.inside_function) for item in imports_of(ast.parse(source))}
    assert found == {("typing.TYPE_CHECKING", False), ("vllm.LLM", True)}
