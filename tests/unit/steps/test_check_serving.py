"""The step of the flow: it proves on the run's own rows, stops at a difference, and says what it did not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import vllm_process
from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.engine_gate import AutoDifferences, Difference
from posttrain_lib.data.serving_check import Report
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.lineage.store import Store
from posttrain_lib.models.scratch import write_scratch_model
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import check_serving, inputs
from steps.base import content_key, run_step
from steps.pipeline import STEPS

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # vLLM alone takes half a minute to start, more beside other work
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]
#: prints a field of the row that no server passes on to a template
SECRET = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.secret }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: the conversation's last answer is another speaker's than the one that serving asks
OTHER_NAME = (
    "{% for m in messages %}<|im_start|>{{ 'bot' if loop.last and m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of a few thousand parameters with the embedded tokenizer."""
    root = tmp_path_factory.mktemp("model")
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, root / "tok")
    architecture = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 512,
    }  # fmt: skip
    write_scratch_model("qwen3", architecture, root / "tok", 0, root / "hf")
    return root / "hf"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate_rows(12, 1)))
    return path


def config_of(model: Path, rows: Path, **data: Any) -> RunConfig:
    return build_run_config(
        {
            "name": "test",
            "data": {"sources": [{"name": "a", "path": str(rows)}], "max_example_tokens": 256, **data},
            "model": {"path": str(model)},
            "train": {"steps": 10, "row_tokens": 256},
        }
    )


def run(config: RunConfig, store: Path) -> tuple[StepManifest, list[str]]:
    said: list[str] = []
    found = run_step(inputs.STEP, config, {}, store=Store(store), say=said.append)
    return run_step(check_serving.STEP, config, {"inputs": found}, store=Store(store), say=said.append), said


def test_the_flow_checks_before_it_touches_the_model() -> None:
    names = [step.name for step in STEPS]
    assert names.index("prepare_data") < names.index("check_serving") < names.index("convert_model")


def test_off_is_said_and_proves_nothing(model: Path, rows: Path, isolated_store: Path) -> None:
    manifest, said = run(config_of(model, rows, serving_check="off"), isolated_store)
    assert manifest.checks == ()
    assert manifest.metrics == {"checked": False}
    assert any("nobody knows" in line for line in said)
    assert json.loads(Path(manifest.outputs["report"].uri).read_text()) == {"checked": False}


def test_without_vllm_the_run_file_is_refused_by_field(
    model: Path, rows: Path, isolated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="vLLM is not installed") as caught:
        run(config_of(model, rows), isolated_store)
    assert caught.value.where == "data.serving_check"
    assert "package vllm" in str(caught.value.fix) and "data.serving_check: off" in str(caught.value.fix)


@pytest.mark.parametrize(
    "change",
    [
        {"serving_samples": 3},
        {"template_date": "2026-01-02"},
        {"template_kwargs": {"a": 1}},
        {"train_on": "last"},
        {"max_example_tokens": 128},
        {"serving_check": "off"},
        {"serving_accepts": ["sent_beyond"]},
    ],
    ids=str,
)
def test_what_decides_the_ids_decides_the_key(
    model: Path, rows: Path, isolated_store: Path, change: dict[str, Any]
) -> None:
    key = {}
    for name, data in {"as it was": {}, "changed": change, "something else": {"held_out": {"fraction": 0.3}}}.items():
        config = config_of(model, rows, **data)
        found = run_step(inputs.STEP, config, {}, store=Store(isolated_store), say=lambda text: None)
        read = check_serving.inputs(config, {"inputs": found})
        assert set(read) == {"source:a", "tokenizer", "model"}
        key[name], _ = content_key(check_serving.STEP, config, read)
    assert key["as it was"] == key["something else"] != key["changed"]


def test_what_is_served_lies_as_an_export_lays_it(
    model: Path, rows: Path, tmp_path: Path, isolated_store: Path
) -> None:
    template, tokenizer = tmp_path / "own.jinja", tmp_path / "tokenizer"
    template.write_text(SECRET)
    shutil.copytree(model, tokenizer, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (tokenizer / "extra.txt").write_text("of the tokenizer")
    config = config_of(model, rows, chat_template=str(template), tokenizer=str(tokenizer))
    found = inputs.inputs(config, {})
    out = tmp_path / "served"
    out.mkdir()
    check_serving.serve_from(found, out)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "extra.txt", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert (out / "chat_template.jinja").read_text() == SECRET
    (tokenizer / "config.json").write_text("{}")
    check_serving.serve_from(found, out)
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_serving.serve_from({**found, "model": ArtifactRef(str(tmp_path), "model", "d")}, out)


def test_a_run_that_compares_nothing_stops_before_vllm_is_asked(
    model: Path, rows: Path, isolated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "is_available", lambda: True)
    monkeypatch.setattr(vllm_process, "ask", lambda *_: pytest.fail("asked"))
    with pytest.raises(DataError, match="nothing is proved") as caught:
        run(config_of(model, rows, max_example_tokens=8), isolated_store)
    assert "12 rows too long" in str(caught.value.got)
    assert not list(isolated_store.glob("steps/check_serving/*/manifest.json"))


def report_of(**figures: Any) -> Report:
    counted = ("rows", "turns", "variants", "left_out", "ends_missing", "sent_beyond", "unchecked")
    told: dict[str, Any] = {"renderer": "HfRenderer", "version": "1", "by_template": True}
    told |= {"stop_ids": [], "server_settings": [], **{name: {} for name in counted}}
    return Report(**{**told, **figures})


@pytest.mark.parametrize(
    ("figures", "failed"),
    [
        ({"turns": {"a": 3}}, []),
        ({"left_out": {"rows_without_messages": 3}}, []),
        ({}, ["training's ids are serving's"]),
        ({"left_out": {"rows_too_long": 64}}, ["training's ids are serving's"]),
        ({"turns": {"a": 3}, "ends_missing": {"x": 1}}, ["trained ends of turns end a generation"]),
        (
            {
                "turns": {"a": 3, "b": 2},
                "sent_beyond": {"<think>\n": {"turns": 2, "sources": {"b": 2}, "first": "row 7"}},
            },
            ["serving sends nothing that training never has"],
        ),
        # Some turns of the source are trained behind it.
        ({"turns": {"a": 3}, "sent_beyond": {"<think>\n": {"turns": 2, "sources": {"a": 2}, "first": "row 7"}}}, []),
        ({"turns": {"a": 3}, "unchecked": {"b": "2 rows too long"}}, ["every source with messages is compared"]),
    ],
    ids=str,
)
def test_the_checks_say_what_was_proved(figures: dict[str, Any], failed: list[str]) -> None:
    checks = check_serving._checks(report_of(**figures))
    assert [check.name for check in checks if not check.passed] == failed
    shown = "; ".join(str(check.value) for check in checks)
    assert ("'<think>\\n' before 2 of" in shown and "first row 7" in shown) == ("sent_beyond" in figures)
    assert ("b: 2 rows too long" in shown) == ("unchecked" in figures)


def test_a_failed_check_stops_the_run_unless_the_run_file_names_it() -> None:
    beyond = {"turns": 3, "sources": {"a": 3}, "first": "row 7", "training": "'' [5 'b']", "serving": "'' [6 'a']"}
    cases = {
        "ends_missing": {"turns": {"a": 3}, "ends_missing": {"x": 1}},
        "sent_beyond": {"turns": {"a": 3}, "sent_beyond": {"a": beyond}},
        "unchecked": {"turns": {"a": 3}, "unchecked": {"b": "2 rows too long"}},
    }
    for part, figures in cases.items():
        report = report_of(**figures)
        (failed,) = (check for check in check_serving._checks(report) if not check.passed)
        with pytest.raises(DataError, match="training and serving do not agree") as caught:
            check_serving._stop_unless_accepted(failed, report, sorted(set(cases) - {part}))
        assert f"data.serving_accepts: [{part}]" in str(caught.value.fix)
        if part == "sent_beyond":
            assert caught.value.where == "row 7" and "[5 'b']" in str(caught.value.got)
            assert "[6 'a']" in str(caught.value.expected)
        check_serving._stop_unless_accepted(failed, report, [part])
    nothing = report_of()
    (failed,) = (check for check in check_serving._checks(nothing) if not check.passed)
    with pytest.raises(DataError, match="ids are serving's"):
        check_serving._stop_unless_accepted(failed, nothing, sorted(cases))


def test_what_auto_tokenizer_makes_of_the_file_is_told_and_stops_nothing() -> None:
    first = Difference("a b", "ids", tuple(range(20)), (1, 2))
    found = {
        "no tokenizer.json": None,
        "equal ids of 9 texts": AutoDifferences("Llama", 9, 0, None),
        "Llama gives other ids for 2 of 9 texts: 'a b' is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...] by the file, "
        "[1, 2] by it": AutoDifferences("Llama", 9, 2, first),
    }
    for said, rebuilt in found.items():
        check = check_serving._tokenizer_check(rebuilt)
        assert check.passed and said in str(check.value)


class TestWithVllm:
    pytestmark = needs_vllm

    def test_equal_rows_pass_and_are_reused(self, model: Path, rows: Path, isolated_store: Path) -> None:
        config = config_of(model, rows, serving_samples=8, template_kwargs={"mood": "calm"})
        manifest, said = run(config, isolated_store)
        assert [check.passed for check in manifest.checks] == [True] * 5
        assert manifest.metrics["autotokenizer"]["differing"] == 0 < manifest.metrics["autotokenizer"]["cases"]
        assert any("serve with --default-chat-template-kwargs" in line for line in said)
        assert manifest.metrics["rows"] == {"a": 8}
        assert manifest.metrics["variants"] == {"default": manifest.metrics["turns"]["a"]}
        assert any("have the ids that HfRenderer of vLLM" in line for line in said)
        again, _ = run(config, isolated_store)
        assert again.reused and again.key == manifest.key

    def test_a_difference_stops_the_step_at_its_token(
        self, model: Path, rows: Path, tmp_path: Path, isolated_store: Path
    ) -> None:
        said = [{"role": "user", "content": "Who?", "secret": "!"}, {"role": "assistant", "content": "Tom."}]
        rows.write_text(rows.read_text() + json.dumps({"messages": said}) + "\n")
        template = tmp_path / "own.jinja"
        template.write_text(SECRET)
        with pytest.raises(DataError, match=r"1 of \d+ trained turns, in 1 rows") as caught:
            run(config_of(model, rows, chat_template=str(template)), isolated_store)
        assert "source a, row rows.jsonl:13, before message 1" in str(caught.value.where)
        assert "'!'] '<|im_end|>" in str(caught.value.got)
        assert "'<|im_end|>']" in str(caught.value.expected)
        assert not list(isolated_store.glob("steps/check_serving/*/manifest.json"))

    def test_an_end_that_stops_nothing_stops_the_run_unless_it_is_accepted(
        self, model: Path, rows: Path, tmp_path: Path, isolated_store: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(model, other)
        for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
            content = json.loads((other / name).read_text())
            content.update({"eos_token": "<|im_start|>"} if name.startswith("tok") else {"eos_token_id": 1})
            (other / name).write_text(json.dumps(content))
        with pytest.raises(DataError, match="end a generation") as caught:
            run(config_of(other, rows, serving_samples=4), isolated_store)
        assert "<|im_end|> at the end of" in str(caught.value.got)
        assert "data.serving_accepts: [ends_missing]" in str(caught.value.fix)
        accepted = config_of(other, rows, serving_samples=4, serving_accepts=["ends_missing"])
        manifest, said = run(accepted, isolated_store)
        assert [check.passed for check in manifest.checks] == [True, False, True, True, True]
        assert any("FAILED, and accepted by the run file, trained ends of turns" in line for line in said)

    def test_turns_that_begin_otherwise_than_serving_asks_stop_the_run_at_that_token(
        self, model: Path, rows: Path, tmp_path: Path, isolated_store: Path
    ) -> None:
        template = tmp_path / "own.jinja"
        template.write_text(OTHER_NAME)
        with pytest.raises(DataError, match="serving sends nothing that training never has") as caught:
            run(config_of(model, rows, chat_template=str(template), serving_samples=4), isolated_store)
        assert "source a, row rows.jsonl:" in str(caught.value.where)
        assert "'b'] 'ot" in str(caught.value.got) and "'assist'] 'ant" in str(caught.value.expected)
