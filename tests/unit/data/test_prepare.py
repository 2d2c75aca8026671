"""Rows into stores: everything is counted, nothing is lost, and it stops where it must not go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_lib.config.data import DataConfig, HeldOut
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.fingerprint import check_fingerprint, fingerprint
from posttrain_lib.data.prepare import prepare_dataset
from posttrain_lib.data.receipt import Receipt
from posttrain_lib.data.split import is_held_out
from posttrain_lib.data.token_store import KINDS, TokenStore
from posttrain_lib.errors import DataError


def row(number: int, answer: str = "Fine.", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"How is number {number}?"},
            {"role": "assistant", "content": answer, **fields},
        ]
    }


class Preparation:
    """A source file, a config, and what came of them."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.said: list[str] = []
        self.out, self.rejects = folder / "out", folder / "rejects"

    def write(self, *rows: Any) -> None:
        lines = [item if isinstance(item, str) else json.dumps(item) for item in rows]
        (self.folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def run(self, **settings: Any) -> Receipt:
        self.out.mkdir()
        raw = {"sources": [{"name": "file", "path": "rows.jsonl"}], "held_out": {"fraction": 0.2}, **settings}
        return prepare_dataset(
            DataConfig.model_validate(raw),
            tokenizer_folder=self.tokenizer,
            inputs={source["name"]: str(self.folder / source["path"]) for source in raw["sources"]},
            out_dir=self.out,
            rejects_dir=self.rejects,
            progress=self.said.append,
        )

    def lines(self, name: str, folder: Path | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in ((folder or self.out) / name).read_text("utf-8").split("\n") if line]


@pytest.fixture
def preparation(tmp_path: Path, chatml_folder: Path) -> Preparation:
    return Preparation(tmp_path, chatml_folder)


def test_every_row_is_in_a_store_or_in_the_quarantine(preparation: Preparation) -> None:
    bad = ["{broken", {"messages": []}, row(900, ""), {"messages": [{"role": "robot", "content": "a"}]}]
    preparation.write(*bad, *(row(number) for number in range(96)))
    receipt = preparation.run(max_refused_fraction=0.05)
    train, held_out = TokenStore(preparation.out / "train"), TokenStore(preparation.out / "held_out")
    assert len(train) + len(held_out) == receipt.total("examples") == 96
    assert len(held_out) == receipt.total("held_out") > 5
    quarantine = preparation.lines("quarantine.jsonl")
    assert [(item["row_id"], item["reason"]) for item in quarantine] == [
        ("rows.jsonl:1", "broken_json"),
        ("rows.jsonl:2", "no_messages"),
        ("rows.jsonl:3", "empty_assistant_turn"),
        ("rows.jsonl:4", "unknown_role"),
    ]
    assert quarantine[0]["row"] == "{broken\n"
    assert quarantine[2]["row"] == row(900, "")
    written = json.loads((preparation.out / "receipt.json").read_text())
    assert written == receipt.to_dict()
    assert written["refused"] == {"broken_json": 1, "no_messages": 1, "empty_assistant_turn": 1, "unknown_role": 1}
    counts = written["sources"]["file"]
    assert (counts["rows"], counts["refused"], counts["examples"]) == (100, 4, 96)
    assert counts["tokens"] == train.total_tokens + held_out.total_tokens
    assert counts["trained_tokens"] == train.trained_tokens + held_out.trained_tokens
    assert sum(written["length_histogram"].values()) == 96
    roles = written["roles"]["file"]
    assert sum(role["tokens"] for role in roles.values()) == counts["tokens"]
    assert roles["assistant"]["trained"] == counts["trained_tokens"]
    assert roles["user"]["trained"] == 0


def test_too_many_refused_rows_stop_it_and_leave_the_quarantine(preparation: Preparation) -> None:
    preparation.write(*("{" for _ in range(3)), *(row(number) for number in range(97)))
    with pytest.raises(DataError, match="3 of 100 rows were refused") as caught:
        preparation.run(max_refused_fraction=0.02)
    text = str(caught.value)
    assert "rows.jsonl:2: broken_json" in text and "data.max_refused_fraction" in text
    assert str(preparation.rejects / "quarantine.jsonl") in text
    assert len(preparation.lines("quarantine.jsonl", preparation.rejects)) == 3
    with pytest.raises(DataError, match="not a token store"):
        TokenStore(preparation.out / "train")


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([row(1, train=False), row(2, weight=0)], {}, "nothing to train on"),
        ([row(1)] * 5, {"held_out": {"fraction": 0.01}}, "no row is held out"),
        ([row(1)] * 5, {"held_out": {"fraction": 0.49, "seed": 1}}, "nothing to train on"),
    ],
    ids=["untrained", "nothing held out", "all held out"],
)
def test_it_stops_where_training_would_be_in_vain(
    preparation: Preparation, rows: list[Any], settings: dict[str, Any], said: str
) -> None:
    preparation.write(*rows)
    with pytest.raises(DataError, match=said):
        preparation.run(**settings)


def test_a_row_that_its_author_keeps_out_of_the_loss_is_no_bad_row(preparation: Preparation) -> None:
    preparation.write(row(0, train=False), *(row(number) for number in range(1, 40)))
    receipt = preparation.run(max_refused_fraction=0)
    assert (receipt.total("refused"), receipt.total("examples")) == (0, 39)
    assert "1 rows without a trained turn" in receipt.summary()
    assert [item["reason"] for item in preparation.lines("quarantine.jsonl")] == ["nothing_to_train"]


def test_long_rows_are_refused_or_cut_and_counted(preparation: Preparation, tmp_path: Path) -> None:
    rows = [row(number, "word " * (80 if number == 7 else 2)) for number in range(50)]
    preparation.write(*rows)
    receipt = preparation.run(max_example_tokens=64, max_refused_fraction=0.1)
    assert receipt.refused == {"too_long": 1}
    preparation.out = tmp_path / "again"
    receipt = preparation.run(max_example_tokens=64, over_length="truncate_right")
    assert (receipt.total("refused"), receipt.total("truncated")) == (0, 1)
    stores = [TokenStore(preparation.out / name) for name in ("train", "held_out")]
    assert max(store.longest for store in stores) == 64


def test_a_cut_that_leaves_nothing_to_train_is_a_refusal(preparation: Preparation) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "b"}]}
    preparation.write(long, *(row(number) for number in range(50)))
    receipt = preparation.run(max_example_tokens=64, over_length="truncate_right", max_refused_fraction=0.1)
    assert receipt.refused == {"nothing_left": 1}


def test_a_turn_that_is_too_long_costs_only_its_own_document(preparation: Preparation, real_data: Path) -> None:
    """Qwen3's template makes a document of every turn; the second one here is over the limit."""
    preparation.tokenizer = real_data / "tokenizers" / "qwen3"
    long = row(1)
    long["messages"] += [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "b"}]
    preparation.write(long, *(row(number) for number in range(2, 40)))
    receipt = preparation.run(max_example_tokens=64)
    assert (receipt.total("refused"), receipt.total("examples")) == (0, 39)
    assert receipt.notes["left_out_too_long"] == 1
    assert [(item["row_id"], item["reason"]) for item in preparation.lines("quarantine.jsonl")] == [
        ("rows.jsonl:1#turn3", "too_long")
    ]


def test_prompts_are_what_serving_sends_and_stand_in_no_training_row(preparation: Preparation) -> None:
    same = [{**row(1), "group": number} for number in range(30)]
    preparation.write(*same, *({**row(number), "group": f"g{number}"} for number in range(2, 60)))
    receipt = preparation.run()
    prompts = preparation.lines("prompts.jsonl")
    assert receipt.notes["held_out_prompts_also_in_training"] > 0
    assert len(prompts) == receipt.total("held_out") - receipt.notes["held_out_prompts_also_in_training"]
    assert all(prompt["answer"] == "Fine." for prompt in prompts)
    train = TokenStore(preparation.out / "train")
    for prompt in prompts:
        ids = np.array(prompt["prompt_ids"])
        assert not any(np.array_equal(train.get(i)[0][: len(ids)], ids) for i in range(len(train)))


def test_a_prompt_that_is_answered_in_the_middle_of_a_training_row_is_a_leak(preparation: Preparation) -> None:
    """Every question stands alone in one row, and as the first of two in a row of another group."""
    rows = []
    for number in range(60):
        long = row(number)
        long["messages"] += [{"role": "user", "content": f"And {number}?"}, {"role": "assistant", "content": "Good."}]
        rows += [{**row(number), "group": f"short {number}"}, {**long, "group": f"long {number}"}]
    preparation.write(*rows)
    receipt = preparation.run()
    held = HeldOut(fraction=0.2)
    short = {n for n in range(60) if is_held_out(f"group:short {n}", held)}
    leaked = {n for n in short if not is_held_out(f"group:long {n}", held)}
    assert leaked and short - leaked, "the seed gives both cases"
    assert receipt.notes["held_out_prompts_also_in_training"] == len(leaked)
    kept = [prompt for prompt in preparation.lines("prompts.jsonl") if prompt["answer"] == "Fine."]
    assert {prompt["messages"][0]["content"] for prompt in kept} == {f"How is number {n}?" for n in short - leaked}


def test_a_row_that_no_file_can_hold_is_kept_in_the_quarantine(preparation: Preparation) -> None:
    preparation.write(row(0, "half \ud83d of a pair"), *(row(number) for number in range(1, 60)))
    receipt = preparation.run(max_refused_fraction=0.1)
    assert receipt.refused == {"not_unicode": 1}
    assert preparation.lines("quarantine.jsonl")[0]["row"] == row(0, "half \ud83d of a pair")


def test_prompts_are_a_bounded_sample(preparation: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_lib.data.prepare._MOST_PROMPTS", 5)
    rows = [row(number) for number in range(100)]
    preparation.write(*rows)
    receipt = preparation.run()
    first = {prompt["messages"][0]["content"] for prompt in preparation.lines("prompts.jsonl")}
    assert len(first) == 5 < receipt.total("held_out")


def test_duplicates_are_counted(preparation: Preparation) -> None:
    preparation.write(*([row(5)] * 3), *(row(number) for number in range(10, 40)))
    assert preparation.run().notes["duplicate_examples"] == 2


def test_weights_reach_the_store(preparation: Preparation) -> None:
    preparation.write(*(row(number, weight=0.25) for number in range(40)))
    preparation.run()
    _, weights = TokenStore(preparation.out / "train").get(0)
    assert set(weights.tolist()) == {0.0, 0.25}


def test_samples_spell_the_tokens(preparation: Preparation) -> None:
    preparation.write(*(row(number) for number in range(40)))
    preparation.run()
    samples = json.loads((preparation.out / "samples.json").read_text("utf-8"))
    assert len(samples) == 3
    for sample in samples:
        trained = [piece for piece, weight in zip(sample["tokens"], sample["weights"], strict=True) if weight > 0]
        assert "".join(trained) == "Fine.<|im_end|>"


def test_a_tokenizer_without_a_template_is_named(preparation: Preparation, real_data: Path) -> None:
    preparation.write(row(1))
    preparation.tokenizer = real_data / "tokenizers" / "gpt2"
    with pytest.raises(DataError, match="no chat template") as caught:
        preparation.run()
    assert "data.chat_template" in str(caught.value)


def test_double_begin_and_missing_end_are_seen(preparation: Preparation, tmp_path: Path, real_tokenizer: Any) -> None:
    template = tmp_path / "twice.jinja"
    template.write_text(
        "<bos><bos>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'user' %}"
        "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    real_tokenizer("llama3")  # Qwen2.5's vocabulary with a <bos>
    preparation.tokenizer = Path(real_tokenizer("llama3")._tokenizer.name_or_path)
    preparation.write(*(row(number) for number in range(40)))
    receipt = preparation.run(chat_template=str(template))
    assert receipt.notes["double_bos"] == receipt.notes["missing_end"] == 40
    failed = {check.name for check in receipt.checks() if not check.passed}
    assert failed == {"no double begin-of-sequence", "the template ends every answer with a marker"}


def pair(number: int, chosen: str = "Fine.", rejected: str = "Bad.") -> dict[str, Any]:
    return {"prompt": f"How is number {number}?", "chosen": chosen, "rejected": rejected}


def _with(preparation: Preparation, format_name: str, **settings: Any) -> Receipt:
    source = {"name": "file", "path": "rows.jsonl", "format": format_name}
    return preparation.run(sources=[source], max_refused_fraction=0.1, **settings)


def test_preference_pairs_stay_pairs_and_are_compared(preparation: Preparation) -> None:
    rows = [pair(number) for number in range(58)]
    preparation.write(*rows, pair(100, "Good.", "Bad."), pair(100, "Bad.", "Good."), pair(7, "Same.", "Same."))
    receipt = _with(preparation, "preference")
    stores = [TokenStore(preparation.out / name) for name in ("train", "held_out")]
    for store in stores:
        assert [KINDS[kind] for kind in store.kinds] == ["pair"] * len(store)
        ids = [store.row_id(example) for example in range(len(store))]
        assert all(one.endswith("#chosen") and other == one.replace("chosen", "rejected")
                   for one, other in zip(ids[::2], ids[1::2], strict=True))  # fmt: skip
        assert (store.shared[::2] == 0).all() and (store.shared[1::2] > 0).all()
    assert sum(map(len, stores)) == 2 * 60
    written = json.loads((preparation.out / "receipt.json").read_text())
    assert written["kinds"] == {"pair": 120} and receipt.refused == {"answers_equal": 1}
    assert written["pairs"]["findings"]["contradicting"]["rows"] == 2
    # asked for evaluation: the prompt, and as the answer wanted the chosen one
    held_out, prompts = stores[1], preparation.lines("prompts.jsonl")
    asked = {prompt["row_id"]: (prompt["prompt_ids"], prompt["answer"]) for prompt in prompts}
    assert asked
    for example in range(0, len(held_out), 2):
        tokens, weights = held_out.get(example)
        if (found := asked.get(held_out.row_id(example).removesuffix("#chosen"))) is not None:
            assert found[0] == tokens[: int(np.flatnonzero(weights)[0])].tolist()
            assert found[1] in ("Fine.", "Good.", "Bad.")


def test_prompts_are_kept_with_their_answers(preparation: Preparation) -> None:
    preparation.write(*({"prompt": f"What is {number}?", "answer": str(number), "level": 3} for number in range(50)))
    receipt = _with(preparation, "prompts")
    store = TokenStore(preparation.out / "train")
    lines = preparation.lines("train_prompts.jsonl")
    assert [store.row_id(example) for example in range(len(store))] == [line["row_id"] for line in lines]
    for example, line in enumerate(lines):
        assert store.get(example)[0].tolist() == line["prompt_ids"] and line["extra"]["level"] == 3
        assert line["messages"][-1]["content"] == f"What is {line['answer']}?"
    assert len(lines) + len(preparation.lines("prompts.jsonl")) == 50
    assert all(check.passed for check in receipt.checks())


def test_rows_of_several_kinds_are_refused(preparation: Preparation) -> None:
    preparation.write(*(pair(number) for number in range(30)))
    (preparation.folder / "more.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(30)))
    sources = [
        {"name": "file", "path": "rows.jsonl", "format": "preference"},
        {"name": "more", "path": "more.jsonl"},
    ]
    with pytest.raises(DataError, match="several kinds"):
        preparation.run(sources=sources)


def test_duplicates_are_counted_or_left_out(preparation: Preparation, tmp_path: Path) -> None:
    preparation.write(*(row(number % 40) for number in range(60)))
    receipt = preparation.run()
    assert receipt.notes["duplicate_examples"] == 20 and receipt.total("examples") == 60
    preparation.out = tmp_path / "again"
    receipt = preparation.run(deduplicate=True)
    assert receipt.notes["left_out_duplicate"] == 20 and receipt.total("examples") == 40
    left_out = [line["row_id"] for line in preparation.lines("quarantine.jsonl")]
    assert left_out == [f"rows.jsonl:{number}" for number in range(41, 61)]
    assert receipt.refused_fraction == 0


def test_a_pair_of_answers_that_stand_in_other_pairs_is_no_duplicate(preparation: Preparation) -> None:
    """A > B > C makes three pairs, and the last has no answer that the others lack."""
    ranked = [
        {"prompt": f"Question {number}?", "chosen": chosen, "rejected": rejected}
        for number in range(30)
        for chosen, rejected in (("a", "b"), ("b", "c"), ("a", "c"), ("a", "b"))
    ]
    preparation.write(*ranked)
    receipt = preparation.run(
        deduplicate=True, sources=[{"name": "file", "path": "rows.jsonl", "format": "preference"}]
    )
    assert receipt.total("examples") == 2 * 3 * 30
    assert [int(line["row_id"].split(":")[1].split("#")[0]) % 4 for line in preparation.lines("quarantine.jsonl")] == [
        0
    ] * 60


def test_near_duplicates_and_oddities_are_reported(preparation: Preparation) -> None:
    text = " ".join(f"w{number * number % 97}" for number in range(120))
    rows = [row(number) for number in range(40)]
    rows += [row(100, text), row(101, text + " end"), row(102, "Zero\u200bwidth and \ufffd.")]
    preparation.write(*rows)
    preparation.run()
    written = json.loads((preparation.out / "receipt.json").read_text())
    near = written["near_duplicates"]
    assert near["near_duplicates"] + near["held_out_near_training"] >= 1
    oddities = written["oddities"]["file"]["oddities"]
    assert {kind for kind, found in oddities.items() if found["first"][0]["row_id"] == "rows.jsonl:43"} >= {
        "replacement_characters",
        "zero_width",
    }


def test_processes_give_what_one_process_gives(preparation: Preparation, tmp_path: Path) -> None:
    preparation.write(*(row(n, "so " * (n % 50) + "on") if n % 90 else "broken" for n in range(1400)))
    found = []
    for workers in (0, 2):
        preparation.out = tmp_path / f"with-{workers}"
        receipt = preparation.run(workers=workers, max_refused_fraction=0.1).to_dict()
        digests = [TokenStore(preparation.out / name).digest for name in ("train", "held_out")]
        small = [(preparation.out / name).read_text() for name in ("prompts.jsonl", "quarantine.jsonl", "samples.json")]
        found.append((receipt, digests, small))
    assert found[0] == found[1]


def test_on_the_fly_only_a_sample_is_prepared(preparation: Preparation) -> None:
    preparation.write(*(row(number) for number in range(500)))
    receipt = preparation.run(on_the_fly=True, on_the_fly_sample=100)
    assert receipt.total("rows") == 100
    assert TokenStore(preparation.out / "train").source_files == {"file": [["rows.jsonl", 100]]}


def test_a_store_knows_what_made_it(preparation: Preparation) -> None:
    preparation.write(*(row(number) for number in range(50)))
    preparation.run()
    store = TokenStore(preparation.out / "train")
    tokenizer = ChatTokenizer(preparation.tokenizer)
    check_fingerprint(store, fingerprint(tokenizer))
    other = ChatTokenizer(preparation.tokenizer, template_date="2027-01-01")
    with pytest.raises(DataError, match="another template"):
        check_fingerprint(store, fingerprint(other))
    settings = preparation.tokenizer / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    copy = shutil.copytree(preparation.tokenizer, preparation.folder / "other")
    (copy / settings.name).write_text(json.dumps({**content, "eos_token": content["pad_token"]}))
    with pytest.raises(DataError, match="another tokenizer"):  # as it ends a text, and a template may print it
        check_fingerprint(store, fingerprint(ChatTokenizer(copy)))
    with pytest.raises(DataError, match="another tokenizer"):
        check_fingerprint(store, {**fingerprint(tokenizer), "tokenizer": "0" * 64})


def test_a_held_out_prompt_that_training_asks_is_not_used(preparation: Preparation) -> None:
    preparation.write(*({"prompt": f"What is {number % 30}?", "answer": "1", "group": number} for number in range(60)))
    receipt = _with(preparation, "prompts", held_out={"fraction": 0.3})
    asked = [str(line["prompt_ids"]) for line in preparation.lines("train_prompts.jsonl")]
    kept = [str(line["prompt_ids"]) for line in preparation.lines("prompts.jsonl")]
    assert receipt.notes["held_out_prompts_also_in_training"] > 0 and not set(kept) & set(asked)


def test_a_misspelt_group_field_stops_the_preparation(preparation: Preparation) -> None:
    preparation.write(*({**row(number), "conversation": f"c{number // 2}"} for number in range(60)))
    receipt = preparation.run(held_out={"fraction": 0.2, "group_field": "conversation"})
    assert receipt.notes["grouped_by_field"] == 60
    preparation.out = preparation.folder / "again"
    with pytest.raises(DataError, match="no row has the field") as caught:
        preparation.run(held_out={"fraction": 0.2, "group_field": "conversation_id"})
    assert "60 rows were grouped by their first question" in str(caught.value)


def _none_by_chance(count: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of so many groups, and a seed by which a twentieth of them is none."""
    rows = [row(number) for number in range(count)]
    asked = [f"user:How is number {number}?" for number in range(count)]
    seed = next(
        seed for seed in range(50) if not any(is_held_out(group, HeldOut(fraction=0.05, seed=seed)) for group in asked)
    )
    return rows, seed


def test_of_a_few_groups_one_is_held_out(preparation: Preparation, tmp_path: Path) -> None:
    rows, seed = _none_by_chance(20)
    preparation.write(*rows)
    held_out = {"fraction": 0.05, "seed": seed}
    receipt = preparation.run(held_out=held_out)
    stores = [TokenStore(preparation.out / name) for name in ("train", "held_out")]
    assert [len(store) for store in stores] == [19, 1]
    assert (receipt.total("rows"), receipt.total("held_out"), receipt.notes["held_out_prompts"]) == (20, 1, 1)
    assert len(preparation.lines("prompts.jsonl")) == 1
    assert "1 group of rows held out where data.held_out.fraction gave none" in receipt.summary()
    assert any("fraction 0.05 holds out none" in said for said in preparation.said)
    # Training that reads the rows itself tells held-out ones by the config: it would train on this one.
    preparation.out = tmp_path / "fly"
    with pytest.raises(DataError, match="no row is held out"):
        preparation.run(held_out=held_out, on_the_fly=True)


def test_rows_of_another_format_are_told_early(preparation: Preparation) -> None:
    preparation.write(*({"prompt": f"p {number}", "completion": "c"} for number in range(1500)))
    with pytest.raises(DataError, match="first 1,000 rows of source 'file'") as caught:
        preparation.run()
    assert "is format: prompt_completion meant?" in str(caught.value)
    kept = preparation.lines("quarantine.jsonl", preparation.rejects)
    assert [line["row_id"] for line in kept] == [f"rows.jsonl:{number}" for number in range(1, 1001)]
    written = json.loads((preparation.rejects / "receipt.json").read_text())
    assert written["refused"] == {"no_messages": 1000}


def test_a_small_file_of_another_format_gets_the_same_hint(preparation: Preparation) -> None:
    preparation.write(*({"prompt": f"p {number}", "completion": "c"} for number in range(5)))
    with pytest.raises(DataError, match="5 of 5 rows were refused") as caught:
        preparation.run()
    assert caught.value.fix == "source 'file': the rows have prompt, completion; is format: prompt_completion meant?"


def test_nothing_flagged_is_told_as_such(preparation: Preparation) -> None:
    preparation.write(*(row(number) for number in range(5)))
    with pytest.raises(DataError, match="nothing to train on") as caught:
        preparation.run(train_on="flagged")
    assert caught.value.fix is not None and "train: true" in caught.value.fix and "data.train_on" in caught.value.fix


@pytest.mark.parametrize("policy", ["refuse", "truncate_right", "truncate_left", "split"])
def test_every_token_is_kept_cut_or_left_out(preparation: Preparation, tmp_path: Path, policy: str) -> None:
    rows = [row(number, "word " * (1 + number * 7 % 90)) for number in range(40)]
    asked = [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "b"}]
    preparation.write(*rows, *rows[:9], {"messages": asked}, {"messages": [*asked, *rows[3]["messages"]]})
    whole = preparation.run(max_refused_fraction=0.9).total("tokens")
    preparation.out = tmp_path / "again"
    receipt = preparation.run(
        max_example_tokens=48,
        over_length=policy,
        deduplicate=True,
        max_refused_fraction=0.95,
        held_out={"fraction": 0.3},
    )
    notes = receipt.notes
    assert notes["read_tokens"] == whole
    assert receipt.total("tokens") + notes["truncated_tokens"] + notes["left_out_tokens"] == whole
    assert (notes["truncated_tokens"] > 0) == policy.startswith("truncate") and notes["left_out_tokens"] > 0
    assert f"{notes['left_out_tokens']:,} tokens in what was refused or left out" in receipt.summary()
    assert next(check for check in receipt.checks() if check.name == "no token is lost").passed
    notes["left_out_tokens"] -= 1
    assert not next(check for check in receipt.checks() if check.name == "no token is lost").passed
