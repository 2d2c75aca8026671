"""Where results came from, and how two runs differ: ``python -m steps.lineage show NAME``, ``... diff NAME NAME``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.graph import DEPTH, Graph, result_of, trace
from posttrain_lib.lineage.missing import Missing, missing
from posttrain_lib.lineage.picture import picture
from posttrain_lib.lineage.store import MANIFEST, Store, disk_errors, read_manifest
from posttrain_lib.lineage.tree import title, tree
from posttrain_lib.schema.manifests import StepManifest
from steps import export
from steps.base import known_digests
from steps.compared_runs import Side, compare_runs, text
from steps.pipeline import STEPS, plain_errors
from steps.recorded import FLOWS, Recorded, is_run, look, nearest_name, recorded_run

_PROMOTED = re.compile(r"models/(?P<name>[\w.-]+)(@(?P<version>\d+))?")
#: characters of a key that name a result
_KEY_LEAST = 6
_KEY = re.compile(rf"((?P<step>\w+)/)?(?P<key>[0-9a-f]{{{_KEY_LEAST},64}})")
_NAMES = f"""NAME is one of
  SFTFlow/1795696944952819   a run of a flow; also SFTFlow/latest and SFTFlow/tag:TAG
  models/my-model@3          a promoted model; without @3 the current one
  train/1a2b3c4d5e6f         a step's result by its key, or by the first {_KEY_LEAST} characters of it or more; also
                             without the step
  some/folder                a folder or file of the store, or a copy of one anywhere
"""
_EXPECTED = (
    f"a run of {', '.join(FLOWS)}; a promoted model; {_KEY_LEAST} characters of a key or more; a folder: "
    "python -m steps.lineage --help has examples"
)


@dataclass(frozen=True)
class Found:
    """What a name leads to: results, and the run where it names one."""

    name: str
    manifests: tuple[StepManifest, ...]
    run: Recorded | None = None


def find(reference: str, *, store: Store, where: str) -> Found:
    """The results that a name stands for.

    Raises:
        ConfigError: it stands for none; a beginning of a key that several have.
        StoreError: a manifest was changed by hand.
    """
    if not reference.strip():
        raise ConfigError("an empty name", where=where, expected=_EXPECTED)
    model = _PROMOTED.fullmatch(reference)
    if is_run(reference):
        return _run(store, reference, where)
    if model is not None:
        version = model["version"]
        entry = promoted.find(store, model["name"], None if version is None else int(version), where=where)
        return Found(f"models/{entry.label}", (_made(store, entry.path, entry.digest, where),))
    if Path(reference).exists():
        return Found(reference, (_made(store, reference, None, where),))
    key = _KEY.fullmatch(reference)
    folders = [] if key is None else sorted((store.root / "steps").glob(f"{key['step'] or '*'}/{key['key']}*"))
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]
    if len(manifests) == 1:
        return Found(f"{manifests[0].step}/{manifests[0].key}", (manifests[0],))
    if manifests:
        raise ConfigError(
            "several results have keys that begin so",
            where=where,
            got=f"{reference}: {', '.join(f'{m.step}/{m.key[:20]}' for m in manifests)}",
            expected="a longer part of the key",
        )
    raise ConfigError(
        "this names no result",
        where=where,
        got=f"{reference}, in {store.root}",
        expected=_EXPECTED,
        fix=nearest_name(reference),
    )


def _run(store: Store, name: str, where: str) -> Found:
    """As Metaflow has it recorded; of a run that it does not know (any more) what the store has."""
    try:
        run = recorded_run(name, store=store, where=where)
    except ConfigError as unknown:
        own = _made_by(store, name)
        if not own:
            raise unknown
        return Found(f"{name}, of which the store has what it made itself, and Metaflow no record", own)
    return Found(run.name, tuple(run.manifests.values()), run)


def _made_by(store: Store, run: str) -> tuple[StepManifest, ...]:
    """What the store has of a run's own results, in the order of their making."""
    folders = (file.parent for file in (store.root / "steps").glob(f"*/*/{MANIFEST}") if _names(file, run))
    made = [found for folder in folders if (found := read_manifest(folder)) is not None]
    return tuple(sorted((m for m in made if m.made_by and m.made_by.name == run), key=lambda m: m.started_at))


def _names(manifest: Path, run: str) -> bool:
    """Whether the file says the run's id at all; most do not, and need not be read as manifests."""
    return run.rpartition("/")[2] in manifest.read_text(encoding="utf-8")


def _made(store: Store, place: str, digest: str | None, where: str) -> StepManifest:
    """What made a folder or file: found by where it lies, else by what it holds."""
    path = Path(place).expanduser().resolve()
    found = result_of(store, str(path)) or (read_manifest(path) if path.is_dir() else None)
    if found is not None:
        return found
    digests = known_digests()
    digest = digest or digests.path(path)
    digests.save()
    for file in sorted((store.root / "steps").glob(f"*/*/{MANIFEST}")):
        if digest in file.read_text(encoding="utf-8"):
            manifest = read_manifest(file.parent)
            assert manifest is not None
            own = Path(manifest.step) / manifest.key
            if any(ref.digest == digest and str(own) in ref.uri for ref in manifest.outputs.values()):
                return manifest
    raise ConfigError(
        "no result in the store is this, or has its content",
        where=where,
        got=f"{place}, digest {digest[:12]}",
        expected=f"a result of a step in {store.root}, or a copy of one",
    )


def show(found: Found, graph: Graph, shown: Graph) -> str:
    """The tree of what is ``shown``, what is known of the run, and what is not there any more with what can still be
    done."""
    lines = [found.name if found.run is None else _of_run(found.run), tree(shown)]
    if further := len(graph.nodes) - len(shown.nodes):
        lines.append(f"and {further} more further back: --depth {2 * DEPTH} shows more")
    told = [_told(each) for each in missing(graph)]
    return "\n".join([*lines, *(["", "not as it was:", *told] if told else [])])


def _of_run(run: Recorded) -> str:
    lacks = f"; not known: {run.code.lacks}" if run.code.lacks else ""
    patch = "" if run.code.patch_file is None else f", uncommitted changes in {run.code.patch_file}"
    hardware = ", ".join(f"{name} {value}" for name, value in run.hardware.items())
    return "\n".join(
        [
            f"{run.name}  {run.config.get('name', '')}  {run.state}" + "".join(f"  #{tag}" for tag in run.tags),
            f"  code         commit {run.code.commit or 'not known'}{patch}{lacks}",
            f"  environment  lock {run.environment['lock'][:12]}, Python {run.environment['python']}",
            f"  hardware     {hardware}",
        ]
    )


def _told(found: Missing) -> str:
    node = found.node
    lines = [f"{title(node)}: {node.state}"]
    if node.manifest is None:
        assert node.ref is not None
        lines.append(f"  it was {node.ref.uri}, digest {node.ref.digest}: put that content back to use it again")
    elif found.lacking:
        lines.append(f"  cannot be made again without {', '.join(title(each) for each in found.lacking)}")
    else:
        lines.append(f"  can be made again, all that it was made of is there: {again(node.manifest)}")
    if found.whole:
        lines.append(f"  still there, made from it: {', '.join(title(each) for each in found.whole)}")
    return "\n".join(lines)


def again(manifest: StepManifest) -> str:
    """How a result is had again that is gone."""
    if manifest.made_by is None:
        return f"python -m steps.{manifest.step} --config FILE"
    from posttrain_lib.adapters.metaflow_runs import flow_file

    made_by = manifest.made_by
    return f"python flows/{flow_file(made_by.flow)} resume start --origin-run-id {made_by.run}"


def _graph(found: Found, store: Store) -> Graph:
    return trace(store, found.manifests, look)


def side_of(found: Found, store: Store) -> Side:
    """What :func:`compare_runs` takes: a run as it is recorded; of a result the run that made it, up to that step.

    Where Metaflow has no record of the run, of what the result came from the steps up to the exports of other runs, and
    what the store has of the run besides; no run file is known then."""
    if found.run is not None:
        return Side(found.name, found.run.config, found.run.manifests)
    last = max((_place(manifest.step) for manifest in found.manifests), default=0)
    run = _maker(found, store)
    if run is not None:
        until = {step: manifest for step, manifest in run.manifests.items() if _place(step) <= last}
        return Side(found.name, run.config, until)
    steps = _nearest(_graph(found, store))
    for name in {manifest.made_by.name for manifest in found.manifests if manifest.made_by is not None}:
        steps = {m.step: m for m in _made_by(store, name) if _place(m.step) <= last} | steps
    return Side(found.name, None, dict(sorted(steps.items(), key=lambda item: _place(item[0]))))


def _maker(found: Found, store: Store) -> Recorded | None:
    """The run that made a single result, where Metaflow has it recorded."""
    manifest = found.manifests[0]
    if len(found.manifests) > 1 or manifest.made_by is None:
        return None
    try:
        run = recorded_run(manifest.made_by.name, store=store)
    except ConfigError:
        return None  # its record is gone, or stands elsewhere: the store knows what the result came from
    recorded = run.manifests.get(manifest.step)
    return run if recorded is not None and recorded.key == manifest.key else None


def _nearest(graph: Graph) -> dict[str, StepManifest]:
    """Of each step the result nearest to a root. An export that is no root is a model of another run, whose steps are
    not those of this one."""
    found: dict[str, StepManifest] = {}
    pending = list(graph.roots)
    seen = set(pending)
    while pending:
        node = graph.nodes[pending.pop(0)]
        if node.manifest is None or (node.manifest.step == export.STEP.name and node.id not in graph.roots):
            continue
        found.setdefault(node.manifest.step, node.manifest)
        further = [edge.node for edge in node.inputs if edge.node not in seen]
        seen.update(further)
        pending += further
    return found


def _place(step: str) -> int:
    """Where a step stands in the chain of every recipe; what lands rows stands before all."""
    names = [each.name for each in STEPS]
    return names.index(step) if step in names else -1


def diff(a: Found, b: Found, store: Store, *, as_json: bool = False) -> str:
    """What differs between two runs, for a terminal or as JSON."""
    one, other = side_of(a, store), side_of(b, store)
    found = compare_runs(store, one, other)
    if not as_json:
        return text(found, one, other)
    return json.dumps({"a": one.name, "b": other.name, **dataclasses.asdict(found)}, indent=1)


def _steps(text: str) -> int:
    """How far back is shown."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: 0, 1, 2, ...")
    return int(text)


def _svg(text: str) -> Path:
    """A picture is SVG; under another ending no program would show it."""
    if not text.lower().endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg")
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m steps.lineage",
        description="What a result came from, up to the raw files; how two runs differ.",
        epilog=_NAMES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    options: dict[str, Any] = {"epilog": _NAMES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    showing = commands.add_parser("show", help="the tree of what a result came from", **options)
    showing.add_argument("name", metavar="NAME")
    showing.add_argument(
        "--depth", type=_steps, default=DEPTH, help="steps from the result that are shown (%(default)s)"
    )
    showing.add_argument("--picture", type=_svg, metavar="FILE.svg", help="also draw it")
    differing = commands.add_parser("diff", help="data, config, code, environment, checks, results", **options)
    differing.add_argument("a", metavar="NAME")
    differing.add_argument("b", metavar="NAME")
    differing.add_argument("--json", action="store_true", help="every difference as JSON")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    with plain_errors():
        store = Store()
        if options.command == "diff":
            a, b = (find(name, store=store, where="diff") for name in (options.a, options.b))
            print(diff(a, b, store, as_json=options.json))
            return
        one = find(options.name, store=store, where="show")
        graph = _graph(one, store)
        shown = graph.nearest(options.depth)
        print(show(one, graph, shown))
        if options.picture is not None:
            with disk_errors("drawing the picture", options.picture):
                options.picture.write_text(picture(shown), encoding="utf-8")


if __name__ == "__main__":
    main()
