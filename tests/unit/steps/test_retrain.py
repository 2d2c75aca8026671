"""What a retrain takes, the run file that it trains by, and the decision, made once of each candidate."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_lib.config.retrain import PROJECT_ROOT, parse_retrain_config
from posttrain_lib.errors import ConfigError, DataError, ModelError, PosttrainError, StoreError, VerificationError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.pointer import TakenFile, TakenRows
from posttrain_lib.lineage.store import Store
from steps import retrain
from steps.promote import main, rollback
from steps.retrain import Refusal, decide, look, resolve, taken_files, training_config
from tests.support.exported import RAW, folder_of, publish_run

FIRST, SECOND = (TakenRows("mine", base, (TakenFile(f"{base}.jsonl", 9, "0" * 64),)) for base in (None, 1))
RUN = {**RAW, "evaluation": {"exact_match_prompts": 8, "gates": {"min_exact_match": 0.5}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "landing"
    folder.mkdir()
    return folder


def config(**changes: Any) -> dict[str, Any]:
    raw = {"name": "mine", "run": RUN, "landing": {"path": "/nowhere"}, **changes}
    return parse_retrain_config(yaml.safe_dump(raw)).model_dump(mode="json")


def decided(rows: TakenRows, words: str, run: str = "1", exact_match: float = 0.9, **changes: Any) -> Any:
    raw = config(**changes)
    return decide(raw, rows, raw["run"], publish_run(words=words, exact_match=exact_match), None, f"RetrainFlow/{run}")


def test_a_candidate_that_proves_itself_is_the_current_version(isolated_store: Path) -> None:
    entry = decided(FIRST, "one")
    assert (entry.action, entry.version, entry.before, entry.run) == ("promoted", 1, None, "RetrainFlow/1")
    assert "exact match 0.9000 (at least 0.5)" in entry.why and "export.verify_vllm" not in entry.why
    version = promoted.find(Store(), "mine", None, where="")
    assert version.label == "mine@1" and version.run == "1" and version.gates == entry.gates


def test_a_gate_that_does_not_hold_keeps_the_old_one(isolated_store: Path) -> None:
    decided(FIRST, "one")
    entry = decided(SECOND, "two", exact_match=0.1)
    assert (entry.action, entry.version, entry.before) == ("rejected", 1, 1)
    assert "gate on exact match: 0.1000, stated at least 0.5" in entry.why
    assert promoted.find(Store(), "mine", None, where="").version == 1


def test_a_failed_check_keeps_the_old_one(isolated_store: Path) -> None:
    raw = config()
    entry = decide(raw, FIRST, raw["run"], publish_run(proven=False), None, "RetrainFlow/1")
    assert entry.action == "rejected" and "check of export: 'logits agree' failed" in entry.why


def test_a_step_that_refused_the_candidate_is_said(isolated_store: Path) -> None:
    raw = config()
    entry = decide(raw, FIRST, raw["run"], {}, Refusal("export", "vLLM does not load it", " (x)"), "RetrainFlow/1")
    assert (entry.action, entry.version) == ("rejected", None) and entry.why == "export: vLLM does not load it (x)"


def test_an_export_that_was_changed_since_is_not_decided_on(isolated_store: Path) -> None:
    raw, made = config(), publish_run(words="one")
    (folder_of(made) / "model.safetensors").write_text("eno")
    with pytest.raises(ModelError, match="changed after it was published"):
        decide(raw, FIRST, raw["run"], made, None, "RetrainFlow/1")
    assert promoted.pointer_of(Store(), "mine").history == ()


def test_the_same_candidate_is_decided_on_once(isolated_store: Path) -> None:
    """A retry of the step, and a second run of the same work."""
    first = decided(FIRST, "one")
    assert decided(FIRST, "one", run="2") == first
    refusal = decided(SECOND, "two", exact_match=0.1)
    assert decided(SECOND, "two", run="3", exact_match=0.1) == refusal
    assert len(promoted.pointer_of(Store(), "mine").history) == 2
    assert [entry.version for entry in promoted.versions_of(Store(), "mine")] == [1]


def test_a_candidate_compared_with_an_older_version_is_kept_out_and_its_rows_are_not_taken(
    isolated_store: Path,
) -> None:
    decided(FIRST, "one")
    decided(SECOND, "two")
    late = dataclasses.replace(SECOND, files=(TakenFile("late.jsonl", 3, "1" * 64),))
    entry = decided(late, "three", run="9")
    assert (entry.action, entry.version, entry.rows) == ("kept out", 2, None)
    assert "compared with version 1, and version 2 is the current one" in entry.why
    assert decided(late, "three", run="10") == entry
    raw = parse_retrain_config(yaml.safe_dump({"name": "mine", "run": RUN, "landing": {"path": "/x"}}))
    taken = taken_files(Store(), raw, promoted.pointer_of(Store(), "mine"))
    assert [file.path for file in taken] == ["None.jsonl", "1.jsonl"]


def test_many_that_decide_at_once_move_the_pointer_once(isolated_store: Path) -> None:
    decided(FIRST, "one")
    raw, manifests, found = config(), [publish_run(words=str(number)) for number in range(6)], []
    rows = [dataclasses.replace(SECOND, files=(TakenFile(f"{n}", 3, str(n) * 64),)) for n in range(6)]

    def one(number: int) -> None:
        found.append(decide(raw, rows[number], raw["run"], manifests[number], None, f"RetrainFlow/{number}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.action for entry in found) == ["kept out"] * 5 + ["promoted"]
    pointer = promoted.pointer_of(Store(), "mine")
    assert pointer.current == 2 and [entry.number for entry in pointer.history] == list(range(1, 8))


@pytest.mark.parametrize(("rejected", "new"), [("leave_out", []), ("offer_again", ["1.jsonl"])])
def test_rows_of_rejected_candidates(isolated_store: Path, rejected: str, new: list[str]) -> None:
    decided(FIRST, "one")
    decided(SECOND, "two", exact_match=0.1)
    assert not_taken(rejected) == new


@pytest.mark.parametrize(("rejected", "new"), [("leave_out", []), ("offer_again", ["1.jsonl"])])
def test_rows_of_a_version_that_was_rolled_back(isolated_store: Path, rejected: str, new: list[str]) -> None:
    decided(FIRST, "one")
    decided(SECOND, "two")
    rollback(Store(), "mine", 1, note="answers got worse")
    assert not_taken(rejected) == new
    again = decided(SECOND, "two", run="7")
    assert again.version == 2 and promoted.find(Store(), "mine", None, where="").version == 1, "not promoted again"
    assert "promoted as version 2 by RetrainFlow/1, version 1 is the current one by now" in retrain.told(
        config(), again
    )


def not_taken(rejected: str) -> list[str]:
    landing = {"path": "/x", "rejected": rejected}
    raw = parse_retrain_config(yaml.safe_dump({"name": "mine", "run": RUN, "landing": landing}))
    taken = {file.path for file in taken_files(Store(), raw, promoted.pointer_of(Store(), "mine"))}
    return [name for name in ("None.jsonl", "1.jsonl") if name not in taken]


def test_a_pointer_changed_by_hand_stops_a_retrain_before_it_begins(isolated_store: Path, tmp_path: Path) -> None:
    decided(FIRST, "one")
    decided(SECOND, "two")
    path = isolated_store / "models" / "mine" / "pointer.json"
    path.write_text(path.read_text().replace('"current": 2', '"current": 1'))
    with pytest.raises(StoreError, match="changed by hand"):
        look(config(landing={"path": str(tmp_path)}))
    with pytest.raises(StoreError, match="changed by hand"):
        decided(SECOND, "three")


def test_a_test_branch_has_a_model_of_its_own() -> None:
    assert resolve(config(), "", None)["name"] == "mine"
    assert resolve(config(), "", "test.new-gates")["name"] == "mine.test.new-gates"


def test_the_run_file_of_the_first_version_and_of_later_ones(isolated_store: Path, folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"messages": []}\n')
    suite = {"task": "exact_match", "name": "suite", "file": "posttrain_lib/embedded/suite.jsonl"}
    gates = {"suite.exact_match": {"min_change": -0.1}}
    raw = config(landing={"path": str(folder)}, suites=[suite], gates=gates)
    due = look(raw)
    assert due.is_due and due.rows.base is None
    first = training_config(raw, due)
    assert [source["name"] for source in first["data"]["sources"]] == ["a", "landed"]
    assert first["model"]["path"] == "folder" and first["evaluation"]["gates"]["min_exact_match"] == 0.5
    assert first["evaluation"]["tasks"][0]["file"] == str(PROJECT_ROOT / "posttrain_lib/embedded/suite.jsonl")
    decided(due.rows, "one", landing={"path": str(folder)})
    assert not look(raw).is_due
    (folder / "b.jsonl").write_text('{"messages": [1]}\n')
    due = look(raw)
    later = training_config({**raw, "keep_sources": False}, due)
    (source,) = later["data"]["sources"]
    assert [path.name for path in Path(source["path"]).iterdir()] == ["b.jsonl"]
    assert later["model"]["origin"]["promoted"] == "mine@1" and later["evaluation"]["gates"]["min_exact_match"] is None
    assert later["evaluation"]["gates"]["metrics"]["suite.exact_match"]["min_change"] == -0.1


def test_the_part_of_landed_rows_in_a_mixture(isolated_store: Path, folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"messages": []}\n')
    run = {**RUN, "train": {**RUN["train"], "mixture": {"sources": {"a": {"weight": 3}}}}}
    landing = {"path": str(folder), "mixture": {"weight": 1}}
    raw = config(run=run, landing=landing)
    mixed = training_config(raw, look(raw))["train"]["mixture"]["sources"]
    assert {name: part["weight"] for name, part in mixed.items()} == {"a": 3, "landed": 1}
    decided(look(raw).rows, "one", landing=landing)
    (folder / "b.jsonl").write_text('{"messages": [1]}\n')
    alone = training_config({**raw, "keep_sources": False}, look(raw))
    assert (
        [*alone["train"]["mixture"]["sources"]] == [source["name"] for source in alone["data"]["sources"]] == ["landed"]
    )


def test_a_warm_start_is_the_first_version_s_alone(isolated_store: Path, folder: Path) -> None:
    """The step evaluate looks at the model behind it, and what the gates compare with is the current version."""
    (folder / "a.jsonl").write_text('{"prompt": "Who?", "answer": "Tom"}\n')
    landing = {"path": str(folder), "format": "prompts"}
    gates = {"held_out.pass@1": {"min_change": 0.0}}
    wanted = {"name": "mine", "run_file": "configs/grpo/default.yaml", "landing": landing, "gates": gates}
    raw = parse_retrain_config(yaml.safe_dump(wanted)).model_dump(mode="json")
    assert training_config(raw, look(raw))["grpo"]["warm_start"] is not None
    decided(look(raw).rows, "one", landing=landing)
    (folder / "b.jsonl").write_text('{"prompt": "Where?", "answer": "here"}\n')
    later = training_config(raw, look(raw))
    assert later["grpo"]["warm_start"] is None and later["model"]["origin"]["promoted"] == "mine@1"


def test_a_gate_that_no_later_version_could_be_held_to_is_told_with_the_first(
    isolated_store: Path, folder: Path
) -> None:
    raw = config(landing={"path": str(folder)}, gates={"held_out.los": {"max_change": 0.0}})
    with pytest.raises(ConfigError, match=r"(?s)a metric that its task does not have.*did you mean 'held_out\.loss'"):
        training_config(raw, look(raw))


def test_trouble_that_is_no_fault_of_the_candidate_ends_the_run(isolated_store: Path) -> None:
    with pytest.raises(ConfigError):
        retrain.attempt(["warm_start"], config()["run"], {}, reuse=True)


@pytest.mark.parametrize(
    ("step", "error", "is_theirs"),
    [
        ("prepare_data", DataError("too many rows were refused"), True),
        ("export", VerificationError("it does not prove itself"), True),
        ("evaluate", DataError("the scorer gave no finite score for each document"), False),
        ("lm_eval", VerificationError("lm-evaluation-harness gave no results"), False),
    ],
)
def test_what_a_candidate_is_measured_with_may_fail_and_its_rows_stay_new(
    monkeypatch: pytest.MonkeyPatch, step: str, error: PosttrainError, is_theirs: bool
) -> None:
    def advance(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(retrain.pipeline, "advance", advance)
    if is_theirs:
        assert retrain.attempt([step], config()["run"], {}, reuse=True)[1] == Refusal(step, error.what, "")
        return
    with pytest.raises(type(error), match=error.what):
        retrain.attempt([step], config()["run"], {}, reuse=True)


CUT = gzip.compress(b'{"messages": []}\n' * 50)[:-12]


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1 nothing"), ("a.jsonl.gz", b"no gzip"), ("b.jsonl.gz", CUT)]
)
def test_a_file_that_cannot_be_read_is_the_candidate_s_fault(
    isolated_store: Path, folder: Path, name: str, content: bytes
) -> None:
    (folder / name).write_bytes(content)
    wanted = {"name": "mine", "run_file": "configs/sft/retrain.yaml", "landing": {"path": str(folder)}}
    raw = parse_retrain_config(yaml.safe_dump(wanted)).model_dump(mode="json")
    plain = training_config(raw, look(raw, lambda _: None), say=lambda _: None)
    _, refused = retrain.attempt(["inputs", "prepare_data"], plain, {}, reuse=True)
    assert refused is not None and refused.step == "prepare_data" and name in refused.details


@pytest.mark.parametrize(
    ("cause", "where", "is_theirs"),
    [
        (None, "s3://bucket/rows.jsonl", True),  # said by the project about what it read
        (ValueError("magic bytes"), "/store/steps/take_rows/%s/rows/a.parquet", True),
        (OSError("thrift"), "file:///store/steps/take_rows/%s/rows/a.parquet", True),
        (OSError(errno.EIO, "disk"), "file:///store/steps/take_rows/%s/rows/a.parquet", False),
        (ValueError("magic bytes"), "s3://bucket/rows.parquet", False),
    ],
)
def test_whose_fault_it_is_that_rows_were_not_read(cause: Exception | None, where: str, is_theirs: bool) -> None:
    error = DataError("the data cannot be read", where=where.replace("%s", "0" * 64))
    error.__cause__ = cause
    assert retrain._is_of_the_rows(error) == is_theirs


def test_of_a_rejected_candidate_it_is_said_how_mended_rows_come_in(isolated_store: Path) -> None:
    decided(FIRST, "one")
    entry = decided(SECOND, "two", exact_match=0.1)
    assert "a file of another name" in retrain.told(config(), entry)
    offered = config(landing={"path": "/nowhere", "rejected": "offer_again"})
    assert "another name" not in retrain.told(offered, entry)


def test_rollback_and_history_on_the_command_line(isolated_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decided(FIRST, "one")
    decided(SECOND, "two")
    main(["--name", "mine", "--rollback", "1", "--note", "answers got worse"])
    assert "version 1 is the current one, 2 was" in capsys.readouterr().out
    main(["--name", "mine", "--history"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "models/mine: version 1 is the current one"
    assert "rolled back 2 -> 1" in told[3] and "answers got worse" in told[3]
    for wrong, said in (
        (["--rollback", "1", "--note", "x"], "is the current one"),
        (["--rollback", "7", "--note", "x"], "no such version"),
        (["--rollback", "2"], "says why"),
    ):
        with pytest.raises(SystemExit):
            main(["--name", "mine", *wrong])
        assert said in capsys.readouterr().err
    assert json.loads((isolated_store / "models" / "mine" / "pointer.json").read_text())["current"] == 1
