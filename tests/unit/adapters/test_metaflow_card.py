"""What the cards draw."""

import math
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from metaflow.cards import VegaChart

from posttrain_lib.adapters.metaflow_card import (
    TrainingCard,
    checks_table,
    coloured_sample,
    curves,
    generations_table,
    headline,
    show,
)
from posttrain_lib.schema.manifests import Check
from posttrain_lib.schema.reports import StepReport

REPORT = StepReport(
    step=1, total_steps=10, loss=1.25, lr=0.1, grad_norm=1.0, trained_weight=50.0, real_tokens=90, slot_tokens=100,
    tokens_seen=450, step_seconds=0.5, data_wait_seconds=0.05, model_flops=1e12, mfu=None, peak_memory_gib=1.0,
)  # fmt: skip


def points(spec: dict, curve: str) -> list[tuple[int, float]]:
    return [(value["step"], value["value"]) for value in spec["data"]["values"] if value["curve"] == curve]


def test_curves_hold_training_and_held_out_loss() -> None:
    start = replace(REPORT, step=0, loss=None, held_out={"all": 6.0, "a": 6.0})
    reports = [start, REPORT, replace(REPORT, step=2, loss=1.0, held_out={"all": 1.5, "a": 1.5})]
    loss = curves(reports)["loss"]
    assert points(loss, "training loss") == [(1, 1.25), (2, 1.0)]
    assert points(loss, "held-out loss") == [(0, 6.0), (2, 1.5)]
    assert points(curves(reports)["throughput"], "tokens/s") == [(1, 180.0), (2, 180.0)]


def test_sources_get_curves_of_their_own_when_there_are_several() -> None:
    report = replace(REPORT, held_out={"all": 1.5, "a": 1.0, "b": 2.0})
    assert points(curves([report])["loss"], "held-out a") == [(1, 1.0)]


def test_long_runs_are_thinned() -> None:
    reports = [replace(REPORT, step=step) for step in range(1, 5001)]
    assert len(curves(reports)["fill"]["data"]["values"]) <= 400


def test_no_look_at_the_held_out_examples_is_thinned_out() -> None:
    reports = [replace(REPORT, step=step, held_out_figures={} if step % 50 else {"f": 1.0}) for step in range(1001)]
    assert points(curves(reports)["f"], "held-out") == [(step, 1.0) for step in range(0, 1001, 50)]


def test_of_rollouts_the_value_that_picks_a_checkpoint_is_called_no_loss() -> None:
    """It is the share of prompts that are answered wrong."""
    looked = {"pass@1": 0.25, "reward": 0.5}
    start = replace(REPORT, step=0, loss=None, held_out={"all": 0.75}, held_out_figures=looked)
    assert headline(start) == "step **0** of 10 · held-out pass@1 **0.2500** before training"
    drawn = curves([start, REPORT])
    assert points(drawn["loss"], "held-out loss") == []
    assert points(drawn["pass@1"], "held-out") == [(0, 0.25)]
    assert headline(replace(start, held_out_figures={})).endswith("held-out loss **0.7500** before training")
    assert headline(replace(start, held_out=None, held_out_figures={})) == "step **0** of 10"


def test_a_chart_says_what_its_lines_are() -> None:
    """A policy's loss has no unit; a figure of held-out answers alone would look as if it was of training's."""
    looked = {"pass@1": 0.25, "reward": 0.5, "reward/exact": 0.5}
    report = replace(REPORT, held_out={"all": 0.75}, held_out_figures=looked, figures={"reward/mean": 0.1})
    charts = curves([report, replace(report, step=2, figures={"reward/mean": 0.2, "reward/exact": 0.2})])
    titles = {name: chart["title"] for name, chart in charts.items()}
    assert "no unit" in titles["loss"] and "nats" not in titles["loss"] and "nats" in curves([REPORT])["loss"]["title"]
    assert titles["pass@1"] == "pass@1 (held-out)" and titles["reward/mean"] == "reward/mean"
    both = charts["reward/exact"]
    assert both["title"] == "reward/exact" and both["encoding"]["color"]["legend"] is not None


def test_a_sample_escapes_markup_and_colours_trained_tokens_only() -> None:
    sample = {"source": "s", "row_id": "1", "tokens": ["<|im_start|>", "hi\n\nthere"], "weights": [0.0, 1.0]}
    text = coloured_sample(sample)._text
    assert "&lt;|im_start|&gt;" in text
    assert "\n\n" not in text  # an empty line would end the HTML block
    assert text.count("background:") == 1


@pytest.mark.parametrize(
    "end", ["\n\n", "\r\r", "\r\n\r\n", "\n\r", "\x0b\x0b", "\x0c\x0c", "\x85\x85", "\u2028\u2028", "\u2029\u2029"]
)
def test_no_text_of_a_row_leaves_its_block(end: str) -> None:
    """Behind an empty line it would be Markdown, and a picture in it would be fetched."""
    text = f"a{end}![x](http://elsewhere.example/p.png)"
    sample = {"source": text, "row_id": text, "tokens": [text, text[:2], end[-1] + text], "weights": [0, 1, 1]}
    spoken = dict.fromkeys(("prompt", "expected", "before", "after"), text)
    cells = [
        *generations_table([spoken])._data[0],
        checks_table([("s", Check("n", False, text, text, text))])._data[0][3],
    ]
    for drawn in (coloured_sample(sample), *cells):
        html = MarkdownIt("commonmark").render(drawn._text)
        assert "<img" not in html and "![x](http" in html
        assert len(drawn._text.splitlines()) == 1


def test_a_check_shows_how_much_of_its_limit_is_taken_up() -> None:
    checks = [
        Check("half", True, 0.5, 1.0), Check("far beyond", False, 900.0, 1.0), Check("no number", False, math.nan, 1.0),
        Check("at least", True, 0.9, 0.5), Check("count", True, 0.0, 0.0), Check("words", True, "same", "same"),
    ]  # fmt: skip
    bars = [row[5] for row in checks_table([("s", check) for check in checks])._data]
    assert [re.findall(r"height:8px;width:(\d+)px", bar._text) if bar else [] for bar in bars] == [
        ["40"], ["80"], ["80"], [], [], [],
    ]  # fmt: skip


class Recorder:
    """Stands where Metaflow's card does: keeps what is appended, counts refreshes."""

    def __init__(self) -> None:
        self.components: list[object] = []
        self.refreshes = 0

    def append(self, component: object) -> None:
        self.components.append(component)

    def refresh(self) -> None:
        self.refreshes += 1


def test_the_live_card_is_built_once_and_then_updated() -> None:
    card = Recorder()
    watch = TrainingCard(card)
    watch(REPORT)
    built = len(card.components)
    watch(replace(REPORT, step=2))
    assert len(card.components) == built > 3
    assert card.refreshes == 2


def test_the_live_card_shows_figures_that_come_with_the_first_update() -> None:
    """As those of rollouts do."""
    card = Recorder()
    watch = TrainingCard(card)
    watch(replace(REPORT, step=0, loss=None, held_out_figures={"reward": 0.5}))
    for step in (1, 2):
        watch(replace(REPORT, step=step, figures={"reward/mean": 0.25}))
    shown = {part._spec["title"]: part._spec for part in card.components if isinstance(part, VegaChart)}
    assert points(shown["reward/mean"], "training") == [(1, 0.25), (2, 0.25)]
    assert len(shown) == sum(isinstance(part, VegaChart) for part in card.components)


def test_numbers_are_short() -> None:
    assert [show(value) for value in (None, 0.123456, "x", 3)] == ["", "0.1235", "x", "3"]
