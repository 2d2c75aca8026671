"""The gates of a run: each one holds, fails, or is not demanded. And what the report card is given, and draws."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from metaflow.cards import Markdown, Table, VegaChart

from posttrain_lib.adapters.metaflow_card import fill_report
from posttrain_lib.config import load_run_config
from posttrain_lib.config.data import DataConfig
from posttrain_lib.data.prepare import RECEIPT, SAMPLES, prepare_dataset
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import TrainingError
from posttrain_lib.rl.figures import MEASURES
from posttrain_lib.schema.manifests import ArtifactRef, Check, StepManifest
from posttrain_lib.schema.reports import StepReport
from steps.pipeline import DEFAULT_CONFIG
from steps.report import check_gates, collect, summarise
from steps.train import shares, throughput

DATA_END = "the data ends after 2 of the 40 steps asked for (a: 3 examples)"
SUMMARY: dict[str, Any] = {
    "held_out_is": "held-out loss",
    "held_out_before": 6.0,
    "held_out_after": 1.5,
    "held_out_ratio": 0.25,
    "data_end": "",
    "exact_match": {"before": 0.0, "after": 0.9, "majority": 0.1, "majority_answer": "red", "prompts": 100},
    "tokens_per_second": 1000.0,
    "fill": 0.99,
    "peak_memory_gib": 1.0,
    "export": "folder",
}


def config(**gates: float) -> dict[str, Any]:
    wanted = {"max_held_out_loss_ratio": None, "min_exact_match": None, "min_exact_match_over_majority": None, **gates}
    overrides = [f"evaluation.gates.{name}={'null' if value is None else value}" for name, value in wanted.items()]
    return load_run_config(DEFAULT_CONFIG, overrides).model_dump(mode="json")


def test_gates_that_hold_print_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    check_gates(config(max_held_out_loss_ratio=0.5, min_exact_match=0.9, min_exact_match_over_majority=0.8), SUMMARY)
    assert "always answering 'red' would give 0.100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gate", "limit", "said"),
    [
        ("max_held_out_loss_ratio", 0.2, "held-out loss ratio"),
        ("min_exact_match", 0.95, "exact match"),
        ("min_exact_match_over_majority", 0.81, "over majority"),
    ],
)
def test_a_gate_that_does_not_hold_stops_the_run(gate: str, limit: float, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        check_gates(config(**{gate: limit}), SUMMARY)


def test_a_gate_on_what_was_not_measured_fails() -> None:
    with pytest.raises(TrainingError, match="not measured"):
        check_gates(config(min_exact_match=0.5), {**SUMMARY, "exact_match": None})


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"min": 0.5, "max": 0.7, "min_change": 0.1, "max_change": 0.3}, None),
        ({"min": 0.7}, "the gate on choices.accuracy does not hold"),
        ({"max": 0.5}, "the gate on choices.accuracy does not hold"),
        ({"min_change": 0.3}, "the gate on the change of choices.accuracy does not hold"),
        ({"max_change": 0.1}, "the gate on the change of choices.accuracy does not hold"),
    ],
)
def test_a_gate_on_a_task_s_metric(gate: dict[str, float], said: str | None) -> None:
    run = config()
    run["evaluation"]["tasks"] = [{"task": "multiple_choice", "name": "choices", "file": "q.jsonl"}]
    run["evaluation"]["gates"]["metrics"] = {"choices.accuracy": gate}
    row = {"task": "choices", "metric": "accuracy", "group": "all"}
    row |= {"after": {"mean": 0.6}, "difference": {"mean": 0.2}}
    other = {**row, "group": "a source", "after": {"mean": 0.0}}
    summary = {**SUMMARY, "comparison": [row, other]}
    if said is None:
        check_gates(run, summary)
        with pytest.raises(TrainingError, match="not measured"):
            check_gates(run, {**SUMMARY, "comparison": []})
        return
    with pytest.raises(TrainingError, match=said):
        check_gates(run, summary)


def test_what_went_wrong_without_a_gate_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_gates(config(), SUMMARY)
    assert "worse" not in capsys.readouterr().out
    check_gates(config(), {**SUMMARY, "held_out_after": 6.5, "data_end": DATA_END})
    said = capsys.readouterr().out
    assert "held-out loss 6.0000 -> 6.5000 (training made it worse)" in said and DATA_END in said.splitlines()


def test_no_gates_demand_nothing() -> None:
    check_gates(config(), {**SUMMARY, "held_out_ratio": 2.0})


def test_a_model_that_answers_everything_right_has_no_ratio() -> None:
    """A retrain of rollouts from a version that solves every held-out prompt: its share of wrong answers is 0."""
    measured = {
        name: 1.0 for name in ("step", "data_end", "tokens_seen", "tokens_per_second", "fill", "peak_memory_gib")
    }
    trained = manifest("train", {**measured, **dict.fromkeys(("data_wait_share", "mfu", "mfu_measured", "hfu"))})
    evaluated = manifest("evaluate", {"held_out_before": {"all": 0.0}, "held_out_after": {"all": 0.0}})
    export = manifest("export", {}, hf=Path("folder"))
    summary = summarise(config(), {"train": trained, "evaluate": evaluated, "export": export})
    check_gates(config(), summary)
    with pytest.raises(TrainingError, match=r"(?s)held-out loss ratio.*not measured"):
        check_gates(config(max_held_out_loss_ratio=0.5), summary)


def test_rewards_alone_are_no_share_of_wrong_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no grader says what is right, what picks the best checkpoint is the reward with its sign changed, and a
    ratio of such numbers is larger the better it went."""
    measured = {
        name: 1.0 for name in ("step", "data_end", "tokens_seen", "tokens_per_second", "fill", "peak_memory_gib")
    }
    trained = manifest("train", {**measured, **dict.fromkeys(("data_wait_share", "mfu", "mfu_measured", "hfu"))})
    rows = [{"task": "held_out", "metric": "reward", "group": "all", "before": {"mean": 0.5}, "after": {"mean": 1.5}}]
    values = {"held_out_before": {"all": -0.5}, "held_out_after": {"all": -1.5}}
    of_rollouts = load_run_config(DEFAULT_CONFIG.parents[1] / "grpo/default.yaml", []).model_dump(mode="json")
    of_rollouts["evaluation"]["gates"]["metrics"] = {}
    summaries = {}
    for title, measure in {"rewards": "reward", "judged": "pass@1"}.items():
        evaluated = manifest("evaluate", {**values, "held_out_is": MEASURES[measure], "comparison": rows})
        export = manifest("export", {}, hf=Path("folder"))
        summaries[title] = summarise(config(), {"train": trained, "evaluate": evaluated, "export": export})
        check_gates(of_rollouts, summaries[title])
    said = capsys.readouterr().out
    assert "held-out reward with its sign changed -0.5000 -> -1.5000" in said
    assert said.count("share of wrong held-out answers -0.5000") == 1
    with pytest.raises(TrainingError, match=r"(?s)held-out loss ratio.*not measured"):
        check_gates(config(max_held_out_loss_ratio=0.5), summaries["rewards"])


def test_a_figure_that_was_measured_after_training_alone_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """As a grader's part of the reward, all of whose gradings failed before."""
    row = {"task": "held_out", "metric": "reward/maths", "group": "all", "before": None, "after": {"mean": 0.5}}
    check_gates(config(), {**SUMMARY, "comparison": [row]})
    assert "held-out reward/maths not measured -> 0.5000" in capsys.readouterr().out


# --- the report card ------------------------------------------------------------------------------------------------

PICTURE = "\r\r![x](http://elsewhere.example/p.png)"


def asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def messages() -> list[dict[str, Any]]:
    """Rows with something of every kind of finding: like ones, markup, two Cyrillic letters' worth of a script."""
    long = " ".join(str(number) for number in range(60))
    odd = [asked("R&amp;B?" + PICTURE, "Yes."), asked("Что это такое, скажи?", "Кружка, конечно.")]
    like = [asked(long, "One."), asked(long, "One"), asked(long, "One.")]
    refused = [{"messages": [{"role": "robot", "content": "beep"}]}]
    return [*generate_rows(60, 0), *odd, *like, *refused]


def pairs() -> list[dict[str, Any]]:
    draw = random.Random(0)
    drawn = [" ".join(draw.choices(("red", "cup", "box", "Tom", "has"), k=8)) for _ in range(60)]
    rows = [
        {"prompt": one, "chosen": two, "rejected": two + " too"}
        for one, two in zip(drawn[::2], drawn[1::2], strict=True)
    ]
    return [*rows, rows[0]]


def manifest(step: str, metrics: dict[str, Any], /, **outputs: Path) -> StepManifest:
    made = {name: ArtifactRef(str(path), name, "0" * 64) for name, path in outputs.items()}
    plain = {"config": {}, "inputs": {}, "environment": {"python": "3"}, "code": {"commit": "c"}, "key_parts": {}}
    checks = (Check(f"proof of {step}", True, f"row {PICTURE}", None, "because"),)
    times = {"started_at": "2026-01-01T00:00:00", "seconds": 1.0}
    return StepManifest(step, 1, "k" * 64, outputs=made, checks=checks, metrics=metrics, **plain, **times)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["messages", "preference"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """(run file, manifests): a real preparation, and what training and evaluation write, of a few figures."""
    root = tmp_path_factory.mktemp("finished")
    rows = messages() if request.param == "messages" else pairs()
    (root / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 400, root / "tok")
    sources = [{"name": "a", "path": "rows.jsonl", "format": request.param}]
    settings = {"sources": sources, "max_refused_fraction": 0.5, "held_out": {"fraction": 0.2}, "engine": "hf"}
    config = DataConfig.model_validate({**settings, "workers": 0})
    inputs = {"a": str(root / "rows.jsonl")}
    folders = {"tokenizer_folder": root / "tok", "out_dir": root, "rejects_dir": root / "rejects"}
    prepare_dataset(config, inputs=inputs, progress=lambda _: None, **folders)
    first = StepReport(
        step=1, total_steps=2, loss=2.0, lr=0.1, grad_norm=1.0, trained_weight=50.0, real_tokens=90, slot_tokens=100,
        tokens_seen=90, step_seconds=0.5, data_wait_seconds=0.0, model_flops=1e9, mfu=None, peak_memory_gib=1.0,
        source_loss={"a": 2.0}, source_tokens={"a": 90, "late": 0}, source_units={"a": 3, "late": 0},
    )  # fmt: skip
    reports = [dataclasses.replace(first, step=0, loss=None, source_loss={}, held_out={"all": 3.0, "a": 3.0}), first]
    reports.append(dataclasses.replace(first, step=2, loss=1.0, source_loss={"a": 1.0}))
    lines = [json.dumps(dataclasses.asdict(report)) for report in reports]
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    match = {"before": 0.0, "after": 0.5, "majority": 0.1, "majority_answer": PICTURE, "prompts": 4}
    spoken = dict.fromkeys(("prompt", "expected", "before", "after"), PICTURE)
    losses = {"held_out_before": {"all": 3.0, "a": 3.0}, "held_out_after": {"all": 1.0, "a": 1.0}}
    training = {**throughput(reports), "sources": shares(reports), "data_end": DATA_END}
    origin = {"reference": "SFTFlow/latest", "flow": "SFTFlow", "run": "17", "tags": ["a", "b"], "promoted": None}
    return {"name": "small", "recipe": "sft"}, {
        "inputs": manifest("inputs", {"model_origin": origin}),
        "prepare_data": manifest("prepare_data", {}, receipt=root / RECEIPT, samples=root / SAMPLES),
        "train": manifest("train", training, metrics=root / "metrics.jsonl"),
        "evaluate": manifest("evaluate", {**losses, "exact_match": match, "generations": [spoken]}),
    }


def test_the_report_has_what_the_receipt_says(finished: tuple[dict[str, Any], Any]) -> None:
    report = collect(*finished)
    assert report["started_from"][2:] == [["run", "17"], ["tags", "a, b"]]
    receipt = json.loads(Path(finished[1]["prepare_data"].outputs["receipt"].uri).read_text())
    (row, *refused), counts = report["data"], receipt["sources"]["a"]
    assert row == ["a", *(f"{counts[name]:,}" for name in ("rows", "examples", "tokens", "trained_tokens"))]
    assert refused == [[f"refused: {why}", str(count), "", "", ""] for why, count in receipt["refused"].items()]
    assert {role for _, role, _, _ in report["roles"]} == set(receipt["roles"]["a"])
    assert report["lengths"] == receipt["length_histogram"] and report["samples"]
    found = {name: (rows, first) for name, rows, first in report["findings"]}
    if receipt["pairs"]:
        assert found["pairs: prefix"][0] == "31" and "rows.jsonl:1" in found["pairs: prefix"][1]
        assert found["near-duplicate examples"][0] == str(receipt["near_duplicates"]["near_duplicates"])
    else:
        assert found["a: html"][0] == "1" and "character" in found["a: html"][1]
        assert (
            found["a: unusual script, cyrillic"][0] == "1"
            and "rows.jsonl:62" in found["a: unusual script, cyrillic"][1]
        )
        assert int(found["near-duplicate examples"][0]) >= 1 and " ~ " in found["near-duplicate examples"][1]


def test_a_crowd_and_what_training_nearly_has_are_shown(finished: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    run, manifests = finished
    receipt = json.loads(Path(manifests["prepare_data"].outputs["receipt"].uri).read_text())
    place = {"a": "a: 1", "b": "a: 2", "similarity": 0.9}
    receipt["near_duplicates"].update(crowded=1234, held_out_near_training=1, first_held_out=[place])
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    samples = Path(manifests["prepare_data"].outputs["samples"].uri)
    prepared = manifest("prepare_data", {}, receipt=tmp_path / "receipt.json", samples=samples)
    found = {row[0]: row[1:] for row in collect(run, {**manifests, "prepare_data": prepared})["findings"]}
    assert found["examples too much like many others to be compared with all of them"][0] == "1,234"
    assert found["held-out examples that training nearly has"] == ["1", "a: 1 ~ a: 2 (0.90)"]
    plain = [row[0] for row in collect(run, manifests)["findings"]]
    assert "examples too much like many others to be compared with all of them" not in plain


def test_a_source_that_gave_nothing_yet_has_a_row_as_long_as_the_others(finished: tuple[dict[str, Any], Any]) -> None:
    assert collect(*finished)["sources"] == [
        ["a", "270", "100.00%", "100.00%", "2.0000", "1.0000"],
        ["late", "0", "0.00%", "0.00%", "", ""],
    ]


def test_the_card_has_every_part_and_no_text_of_a_row_leaves_its_block(finished: tuple[dict[str, Any], Any]) -> None:
    card: list[Any] = []
    fill_report(card, collect(*finished), finished[1])
    tables = [part for part in card if isinstance(part, Table)]
    assert len(tables) >= 8 and sum(isinstance(part, VegaChart) for part in card) == 7
    for table in tables:
        assert table._data and {len(row) for row in table._data} == {len(table._headers)}
    cells = [cell for table in tables for row in table._data for cell in row]
    texts = [part._text for part in (*card, *cells) if isinstance(part, Markdown)]
    assert sum(DATA_END in text for text in texts) == 1
    assert not any("![x]" in cell for cell in cells if isinstance(cell, str))
    assert sum("![x]" in text for text in texts) >= 6 and not any("\r" in text for text in texts)


def test_of_rollouts_the_card_says_where_the_time_of_batches_went_and_counts_no_trained_tokens(
    finished: tuple[dict[str, Any], Any], tmp_path: Path
) -> None:
    run, manifests = finished
    lines = [json.loads(line) for line in Path(manifests["train"].outputs["metrics"].uri).read_text().splitlines()]
    # The first batch pays for warm-up and does not count; the others by their length.
    for line, seconds in zip(lines, (50.0, 1.0, 3.0), strict=True):
        parts = {"time/wait_for_rollouts_seconds": seconds / 2, "time/push_seconds": 0.5}
        idle = {"idle/reward": 1.0 - 1.0 / seconds}
        line["figures"] = {**parts, **idle, "time/batch_seconds": seconds, "rollout/trained": 1.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train = manifest("train", manifests["train"].metrics, metrics=tmp_path / "metrics.jsonl")
    report = collect(run, {**manifests, "train": train})
    assert report["performance"][-3:] == [
        ["time of a batch: wait for rollouts", "50.0%"],
        ["time of a batch: push", "25.0%"],
        ["without work: reward", "50.0%"],
    ]
    report["samples"] = [{**sample, "weights": [0.0] * len(sample["weights"])} for sample in report["samples"]]
    card: list[Any] = []
    fill_report(card, report, manifests)
    heads = [part._headers for part in card if isinstance(part, Table)]
    assert ["", "rows", "examples", "tokens"] in heads and not any("trained tokens" in head for head in heads)
