"""Metaflow cards: the live view of a training step, and the report of a whole run.

Every function takes plain manifests and reports; nothing here decides anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaflow.cards import Markdown, ProgressBar, Table, VegaChart

from posttrain_lib.adapters.metaflow_calibration import reliability_chart
from posttrain_lib.adapters.metaflow_comparison import comparison_parts
from posttrain_lib.adapters.metaflow_lineage import lineage_parts
from posttrain_lib.adapters.metaflow_parts import FAILED, PASSED, SCHEMA, block, escaped, text
from posttrain_lib.schema.manifests import Check, StepManifest
from posttrain_lib.schema.reports import StepReport

_TRAINED = "#ffe082"
#: points per curve; more makes the page slow without being visible
_MAX_POINTS = 400
#: characters of an answer in a table
_MOST_SHOWN = 600


class TrainingCard:
    """The live card of a training step: call it with every :class:`StepReport`."""

    def __init__(self, card: Any) -> None:
        self._card = card
        self._reports: list[StepReport] = []
        self._progress: ProgressBar | None = None
        self._headline = Markdown("Waiting for the first step.")
        self._charts: dict[str, VegaChart] = {}
        self._answers = Markdown("")

    def __call__(self, report: StepReport) -> None:
        self._reports.append(report)
        if self._progress is None:
            self._start(report)
        assert self._progress is not None
        self._progress.update(report.step)
        self._headline.update(headline(report))
        for name, spec in curves(self._reports).items():
            if name in self._charts:
                self._charts[name].update(spec)
            else:  # before training a policy has no figures of its steps
                self._charts[name] = VegaChart(spec)
                self._card.append(self._charts[name])
        if report.answers:
            self._answers.update(answers_html(report.answers))
        self._card.refresh()

    def _start(self, report: StepReport) -> None:
        self._progress = ProgressBar(max=report.total_steps, label="steps", value=report.step)
        self._charts = {name: VegaChart(spec) for name, spec in curves([report]).items()}
        charts = self._charts.values()
        for component in (Markdown("# Training"), self._progress, self._headline, self._answers, *charts):
            self._card.append(component)


def headline(report: StepReport) -> str:
    """One line on where training stands."""
    if report.loss is None and report.step > 0:
        return f"step **{report.step}** of {report.total_steps} · {report.event}"
    if report.loss is None:
        losses = _held_out_loss(report)
        first = [("loss", losses["all"])] if losses else list(report.held_out_figures.items())[:1]
        held_out = "".join(f" · held-out {name} **{value:.4f}** before training" for name, value in first)
        return f"step **0** of {report.total_steps}{held_out}"
    mfu = "" if report.mfu is None else f" · MFU {report.mfu:.1%}"
    return (
        f"step **{report.step}** of {report.total_steps} · loss **{report.loss:.4f}** · "
        f"{report.tokens_per_second:,.0f} tokens/s · fill {report.fill:.1%}{mfu} · "
        f"{report.peak_memory_gib:.2f} GiB at most"
    )


def curves(reports: Sequence[StepReport]) -> dict[str, dict[str, Any]]:
    """Vega-Lite charts by name: loss and held-out, learning rate and gradient norm, throughput, packing fill."""
    thin = reports[:: max(1, math.ceil(len(reports) / _MAX_POINTS))]
    held = [report for report in reports if report.held_out or report.held_out_figures]
    loss = [{"step": r.step, "value": r.loss, "curve": "training loss"} for r in thin if r.loss is not None]
    loss += [
        {"step": r.step, "value": value, "curve": f"held-out {'loss' if name == 'all' else name}"}
        for r in held
        for name, value in _held_out_loss(r).items()
        if name == "all" or len(_held_out_loss(r)) > 2
    ]
    steps = [r for r in thin if r.step > 0]
    peaks = {"MFU": "mfu", "MFU of the measured peak": "mfu_measured", "HFU": "hfu"}
    return {
        "loss": line_chart(_loss_title(reports), loss),
        **_figure_charts(thin, held),
        "throughput": line_chart(
            "Throughput (real tokens per second)",
            [{"step": r.step, "value": r.tokens_per_second, "curve": "tokens/s"} for r in steps],
        ),
        "mfu": line_chart(
            "Share of the peak (model FLOPs; HFU with what is computed again)",
            [
                {"step": r.step, "value": getattr(r, name), "curve": curve}
                for r in steps
                for curve, name in peaks.items()
                if getattr(r, name) is not None
            ],
        ),
        "time": line_chart(
            "Where a step's time goes (seconds)",
            [
                {"step": r.seconds_of_step, "value": value, "curve": kind}
                for r in steps
                for kind, value in r.seconds.items()
            ],
        ),
        "fill": line_chart(
            "Packing fill (real tokens / row slots)",
            [{"step": r.step, "value": r.fill, "curve": "fill"} for r in steps],
        ),
        "gradient": line_chart(
            "Gradient norm before clipping", [{"step": r.step, "value": r.grad_norm, "curve": "norm"} for r in steps]
        ),
    }


def _loss_title(reports: Sequence[StepReport]) -> str:
    if any("reward" in report.held_out_figures or "reward/mean" in report.figures for report in reports):
        return "Loss of the policy (no unit: its gradient counts, and no value of it is a good one)"
    return "Loss (nats per trained token, or per pair)"


def _held_out_loss(report: StepReport) -> dict[str, float]:
    """By source; of rollouts the value that picks the best checkpoint is none, and stands among their figures."""
    return {} if "reward" in report.held_out_figures else report.held_out or {}


def _figure_charts(steps: Sequence[StepReport], held: Sequence[StepReport]) -> dict[str, dict[str, Any]]:
    """A chart for each figure of the loss's own, of the steps and of the held-out examples. A line alone has no legend:
    that it is of held-out examples stands in the title."""
    told = [(report.step, "training", report.figures) for report in steps]
    told += [(report.step, "held-out", report.held_out_figures) for report in held]
    values: dict[str, list[dict[str, Any]]] = {}
    for step, curve, figures in told:
        for name, value in figures.items():
            values.setdefault(name, []).append({"step": step, "value": value, "curve": curve})
    alone = {name for name, points in values.items() if all(point["curve"] == "held-out" for point in points)}
    return {
        name: line_chart(f"{name} (held-out)" if name in alone else name, points) for name, points in values.items()
    }


def line_chart(title: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    """A line chart of ``value`` over ``step``, one colour per ``curve``."""
    several = len({value["curve"] for value in values}) > 1
    return _chart(
        title,
        values,
        {"type": "line", "point": len(values) < 30},
        {
            "x": {"field": "step", "type": "quantitative", "title": "optimiser step", "axis": {"tickMinStep": 1}},
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": {"field": "curve", "type": "nominal", "title": None, "legend": {} if several else None},
        },
    )


def bar_chart(title: str, counts: Mapping[str, float], axis: str) -> dict[str, Any]:
    """Bars in the given order."""
    values = [{"bin": name, "count": count} for name, count in counts.items()]
    encoding = {
        "x": {"field": "bin", "type": "ordinal", "sort": list(counts), "title": axis, "axis": {"labelAngle": -40}},
        "y": {"field": "count", "type": "quantitative", "title": None},
    }
    return _chart(title, values, {"type": "bar"}, encoding)


def _chart(title: str, values: list[dict[str, Any]], mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "title": title,
        "width": "container",
        "height": 220,
        "data": {"values": values},
        "mark": {**mark, "tooltip": True},
        "encoding": encoding,
    }


def coloured_sample(sample: Mapping[str, Any]) -> Markdown:
    """One document, its trained tokens on a coloured ground (paler for weights under 1)."""
    pieces = []
    for token, weight in zip(sample["tokens"], sample["weights"], strict=True):
        shown = escaped(token, "&#9166;<br>")
        shade = f"background:{_TRAINED};opacity:{0.55 + 0.45 * min(1.0, weight):.2f}" if weight else "color:#666"
        pieces.append(f"<span style='{shade}'>{shown}</span>")
    name = escaped(f"{sample['source']} {sample['row_id']}")
    return block(
        f"<b>{name}</b><div style='font-family:monospace;font-size:13px;line-height:1.5'>{''.join(pieces)}</div>"
    )


def checks_table(checks: Iterable[tuple[str, Check]]) -> Table:
    """Every check of every step, with value and limit, and a bar of how much of the limit is taken up."""
    rows = []
    for step, check in checks:
        colour, word = (PASSED, "passed") if check.passed else (FAILED, "FAILED")
        verdict = block(f"<b style='color:{colour}'>{word}</b>")
        # Values quote rows, as a token or a text that differs.
        value, limit = (text(show(said)) for said in (check.value, check.limit))
        rows.append([step, check.name, verdict, value, limit, _share(check), text(check.reason)])
    return Table(rows, headers=["step", "check", "result", "measured", "limit", "of the limit", "why this limit"])


def _share(check: Check) -> Any:
    """A bar, for a number that is to be at most another one."""
    value, limit = check.value, check.limit
    if not isinstance(value, float) or not isinstance(limit, float) or not limit > 0:
        return ""
    if check.passed != (value <= limit):
        return ""  # a limit from below
    width = 80 * min(1.0, value / limit) if not math.isnan(value) else 80
    colour = PASSED if check.passed else FAILED
    bar = f"<div style='height:8px;width:{width:.0f}px;background:{colour}'></div>"
    return block(f"<div style='width:80px;background:#ddd'>{bar}</div>")


def show(value: Any) -> str:
    """A number at four significant digits, anything else as text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def generations_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """Prompt, expected answer, and what the model said before and after."""
    rows = [
        [text(item["prompt"]), text(item["expected"]), text(item["before"]), text(item["after"])] for item in samples
    ]
    return Table(rows, headers=["prompt (last turn)", "expected", "before training", "after training"])


def answers_html(answers: Sequence[Mapping[str, Any]]) -> str:
    """What the policy answered, with its reward: a table in one block, for a component that is updated."""
    heads = ("update", "", "prompt (last turn)", "answer", "expected", "reward", "tokens")
    rows = []
    for one in answers:
        parts = ", ".join(f"{name} {show(value)}" for name, value in one["parts"].items())
        reward = show(one["reward"]) + (f" ({parts})" if len(one["parts"]) > 1 else "")
        tokens = f"{one['tokens']}{'' if one['finished'] else ', cut off'}"
        cells = (one["version"], one["kind"], one["prompt"], one["answer"], one["expected"] or "", reward, tokens)
        rows.append("".join(f"<td>{escaped(str(cell)[:_MOST_SHOWN])}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div><table style='font-size:12px'><tr>{head}</tr>{body}</table></div>"


def _append_curves(card: Any, reports: Sequence[StepReport]) -> None:
    """Charts; those of a kind of figures, the part of a name before its slash, below a heading."""
    card.append(Markdown("## Curves"))
    above = ""
    for name, spec in sorted(curves(reports).items(), key=lambda item: _kind(item[0])):
        if (kind := _kind(name)) != above:
            card.append(Markdown(f"### {kind}"))
            above = kind
        card.append(VegaChart(spec))


def _kind(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def fill_report(card: Any, report: Mapping[str, Any], manifests: Mapping[str, StepManifest]) -> None:
    """The card of a finished run. ``report`` is what ``steps.report.collect`` returns."""
    reports = [StepReport(**row) for row in report["reports"]]
    card.append(Markdown(f"# {report['name']}: {report['recipe']} run report"))
    if report["lacks"]:
        card.append(Markdown("## Trained as transformers' own class (`model.backend: hf`)"))
        card.append(Table([[text(lack)] for lack in report["lacks"]], headers=["what that lacks"]))
    headline_cells = [[text(cell) for cell in row] for row in report["headline"]]  # an answer of a row is among them
    card.append(Table(headline_cells, headers=["figure", "before", "after"]))
    if report["data_end"]:
        card.append(text(report["data_end"]))
    for part in comparison_parts(report["comparison"]):
        card.append(part)
    if report["calibration"]:
        card.append(VegaChart(reliability_chart(report["calibration"])))
    _append_curves(card, reports)
    shown = [report.answers for report in reports if report.answers]
    if shown:
        card.append(Markdown("## Answers of the policy, at first and at last"))
        for answers in shown[:1] + shown[1:][-1:]:
            card.append(Markdown(answers_html(answers)))
    card.append(Markdown("## Performance"))
    card.append(Table(report["performance"], headers=["over all steps but the first", ""]))
    card.append(Markdown("## Data"))
    trained = any(weight for sample in report["samples"] for weight in sample["weights"])
    for name, heads in (("data", ["", "rows", "examples", "tokens"]), ("roles", ["source", "role", "tokens"])):
        heads += ["trained tokens"] if trained else []  # prompts have none
        card.append(Table([row[: len(heads)] for row in report[name]], headers=heads))
    sources = ["source", "tokens given", "share of examples", "share of tokens", "first loss", "last loss"]
    if report["sources"]:  # of rollouts training sees no source's rows
        card.append(Markdown("### What training saw of each source"))
        card.append(Table(report["sources"], headers=sources))
    if report["findings"]:
        findings = [[text(cell) for cell in row] for row in report["findings"]]
        card.append(Table(findings, headers=["worth a look", "rows", "first ones"]))
    if report["notes"]:
        card.append(Table(report["notes"], headers=["counted on the way", ""]))
    card.append(VegaChart(bar_chart("Length of examples (tokens)", report["lengths"], "tokens")))
    card.append(Markdown("### Samples: what is trained is coloured" if trained else "### Samples: prompts"))
    for sample in report["samples"]:
        card.append(coloured_sample(sample))
    card.append(Markdown("## Before and after"))
    card.append(generations_table(report["generations"]))
    card.append(Markdown("## Verification"))
    card.append(checks_table([(name, check) for name, m in manifests.items() for check in m.checks]))
    for part in lineage_parts(report["lineage"]):
        card.append(part)
    if report["started_from"]:
        started_from = [[name, text(value)] for name, value in report["started_from"]]
        card.append(Table(started_from, headers=["the model it began with", ""]))
    card.append(Table([[key, value] for key, value in report["environment"].items()], headers=["environment", ""]))
