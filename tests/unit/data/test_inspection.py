"""Rows are found by the ids that receipts print, shown as they are stored, and in the pack that the loader builds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.train import TrainConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.inspection import Inspection
from posttrain_lib.data.inspection_view import described, locate, own_id, pack_line, spell, visible
from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.prepare import prepare_dataset
from posttrain_lib.data.store_feed import feed_for
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import TokenizedExample

TRAIN = {"steps": 100, "row_tokens": 128, "rows_per_step": 2, "packing_buffer": 8}


def row(number: int, answer: str = "Fine.", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"How is number {number}?"},
            {"role": "assistant", "content": answer, **fields},
        ]
    }


class Prepared:
    """Rows in a file, prepared, and opened for looking."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer, self.config = folder, tokenizer, DataConfig.model_validate(self._raw())

    @staticmethod
    def _raw(**settings: Any) -> dict[str, Any]:
        return {
            "sources": [{"name": "file", "path": "rows.jsonl", "format": settings.pop("format", "messages")}],
            "held_out": {"fraction": 0.2},
            "max_example_tokens": 128,
            "max_refused_fraction": 0.5,
            **settings,
        }

    def prepare(self, *rows: Any, **settings: Any) -> Prepared:
        lines = [item if isinstance(item, str) else json.dumps(item) for item in rows]
        (self.folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.config = DataConfig.model_validate(self._raw(**settings))
        out, rejects = self.folder / "out", self.folder / "rejects"
        out.mkdir()
        prepare_dataset(
            self.config,
            tokenizer_folder=self.tokenizer,
            inputs=self._inputs(),
            out_dir=out,
            rejects_dir=rejects,
            progress=lambda text: None,
        )
        return self

    def open(self, folder: str = "out", **train: Any) -> Inspection:
        settings = TrainConfig.model_validate({**TRAIN, **train})
        return Inspection(self.folder / folder, self.config, settings, ChatTokenizer(self.tokenizer), self._inputs())

    def _inputs(self) -> dict[str, str]:
        return {source.name: str(self.folder / "rows.jsonl") for source in self.config.sources}

    def store(self, split: str = "train") -> TokenStore:
        return TokenStore(self.folder / "out" / split)


@pytest.fixture
def prepared(tmp_path: Path, chatml_folder: Path) -> Prepared:
    return Prepared(tmp_path, chatml_folder)


def test_a_row_is_found_by_every_form_of_its_id_and_shown_as_it_is_stored(prepared: Prepared) -> None:
    rows = [row(number, weight=0.25 if number % 2 else None) for number in range(40)]
    opened = prepared.prepare(*rows).open()
    store = prepared.store()
    for example in range(0, len(store), 5):
        row_id = store.row_id(example)
        forms = [row_id, f" {row_id}", f"file: {row_id}", f"file:{row_id}", f"file {row_id}"]
        found = [opened.row(form) for form in forms]
        assert all(one == found[0] == opened.example(example) for one in found)
        (shown,) = opened.show(found[0])
        number = int(row_id.rpartition(":")[2]) - 1
        assert (shown.source, shown.row_id, shown.split, shown.kind) == ("file", row_id, "train", "document")
        assert shown.raw == rows[number]
        assert [(said.role, said.text) for said in shown.said] == [
            ("user", f"How is number {number}?"),
            ("assistant", "Fine."),
        ]
        (document,) = shown.documents
        ids, weights = store.get(example)
        assert np.array_equal(document.ids, ids) and np.array_equal(document.weights[1:], weights[1:])
        trained = "".join(p.text for p in document.pieces if document.weights[p.begin] > 0)
        assert trained == "Fine.<|im_end|>"
        assert {role for role, weight in zip(document.roles, weights, strict=True) if weight} == {"assistant"}
        assert document.roles[0] == "user" and document.special[0] and document.trained == np.count_nonzero(weights)
        assert f"weights {0.25 if number % 2 else 1:g} x {document.trained}" in described(document)
        assert shown.warnings == shown.refusals == ()


def test_rows_of_one_id_are_told_apart_by_their_source(prepared: Prepared) -> None:
    sources = [{"name": name, "path": "rows.jsonl"} for name in ("file", "twin")]
    opened = prepared.prepare("{", *(row(number) for number in range(40)), sources=sources).open()
    for row_id in ("rows.jsonl:1", "rows.jsonl:5"):
        assert [found.source for found in opened.row(row_id)] == ["file", "twin"]
        assert [found.source for found in opened.row(f"twin: {row_id}")] == ["twin"]
    with pytest.raises(DataError, match="no row of that id"):
        opened.row("other: rows.jsonl:5")


def test_held_out_rows_are_said_to_be_never_trained(prepared: Prepared) -> None:
    opened = prepared.prepare(*(row(number) for number in range(40))).open()
    (shown,) = opened.show(opened.row(prepared.store("held_out").row_id(0)))
    assert (shown.split, shown.documents[0].pack) == ("held_out", None)
    assert shown.documents[0].pack_note == "held out: never trained"
    assert {found.split for found in opened.random(3, "held_out")} == {"held_out"}


def test_chosen_rows(prepared: Prepared) -> None:
    opened = prepared.prepare(*(row(number, "word " * (number % 13 + 1)) for number in range(60))).open()
    store = prepared.store()
    longest = [store.lengths[found.examples[0]] for found in opened.longest(7)]
    assert longest == sorted(store.lengths.tolist(), reverse=True)[:7]
    drawn = [opened.random(10, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({found.row_id for found in drawn[0]}) == 10
    assert len(opened.random(1000)) == len(store)
    with pytest.raises(DataError, match=f"no example {len(store)}") as caught:
        opened.example(len(store))
    assert caught.value.expected == f"0 to {len(store) - 1}"


def test_refused_rows_are_shown_with_reason_and_content(prepared: Prepared) -> None:
    bad = ["{broken", {"messages": []}, row(900, ""), row(901, train=False), row(902, "word " * 200)]
    opened = prepared.prepare(*bad, *(row(number) for number in range(40))).open()
    found, counts = opened.refused(None, 10)
    shown = opened.show(found)
    reasons = ["broken_json", "no_messages", "empty_assistant_turn", "nothing_to_train", "too_long"]
    assert [item.refusals[0][:2] for item in shown] == [(f"rows.jsonl:{n}", why) for n, why in enumerate(reasons, 1)]
    assert counts == dict.fromkeys(reasons, 1)
    assert [item.raw for item in shown] == ["{broken\n", *bad[1:]]
    assert [[said.role for said in item.said] for item in shown[3:]] == [["user", "assistant"]] * 2
    assert opened.row("rows.jsonl:3") == opened.refused("empty_assistant_turn", 10)[0] == found[2:3]
    assert len(opened.refused(None, 2)[0]) == 2
    with pytest.raises(DataError, match="nothing was refused as 'tolong'") as caught:
        opened.refused("tolong", 10)
    assert "too_long (1)" in str(caught.value.expected) and "'too_long'" in str(caught.value.fix)


def test_a_duplicate_that_the_quarantine_only_names_is_read_again(prepared: Prepared) -> None:
    opened = prepared.prepare(*(row(number % 39) for number in range(40)), deduplicate=True).open()
    (shown,) = opened.show(opened.row("rows.jsonl:40"))
    assert (shown.refusals[0][1], shown.raw) == ("duplicate", row(0))


def test_of_a_preparation_that_stopped_the_refused_rows_can_be_looked_at(prepared: Prepared) -> None:
    with pytest.raises(DataError, match="1 of 40 rows were refused"):
        prepared.prepare("{", *(row(number) for number in range(39)), max_refused_fraction=0.01)
    opened = prepared.open("rejects")
    assert opened.show(opened.refused(None, 10)[0])[0].refusals[0][1] == "broken_json"
    with pytest.raises(DataError, match="the preparation stopped"):
        opened.random(1)
    with pytest.raises(DataError, match="nothing was prepared"):
        prepared.open("nowhere")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rows.jsonl:999", "rows.jsonl:38 or rows.jsonl:39 or rows.jsonl:40"),
        ("file: row.jsonl:7", "rows.jsonl:6 or rows.jsonl:7 or rows.jsonl:8"),
        ("rows.json:2#turn3", "rows.jsonl:1 or rows.jsonl:2 or rows.jsonl:3"),
        ("what", "rows.jsonl:1 or rows.jsonl:2 or rows.jsonl:3"),
    ],
)
def test_an_unknown_id_is_answered_with_the_nearest(prepared: Prepared, name: str, near: str) -> None:
    opened = prepared.prepare(*(row(number) for number in range(40))).open()
    with pytest.raises(DataError, match="no row of that id") as caught:
        opened.row(name)
    assert (caught.value.got, caught.value.expected) == (name, f"an id such as {near}")


def test_several_documents_of_a_row_and_a_part_that_was_left_out(prepared: Prepared, real_data: Path) -> None:
    """Qwen3's template rewrites earlier turns: a document a turn, and the third is over the limit here."""
    prepared.tokenizer = real_data / "tokenizers" / "qwen3"
    turns = [("a question with some words in it, more than a few of them", "One."), ("And?", "Two."), ("b " * 200, "c")]
    long = {
        "messages": [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ],
        "group": "in training",
    }
    others = [{**row(number), "group": f"g{number}"} for number in range(40)]
    opened = prepared.prepare(long, *others).open()
    (shown,) = opened.show(opened.row("rows.jsonl:1"))
    assert shown.split == "train", "the group's hash"
    assert [document.row_id for document in shown.documents] == ["rows.jsonl:1#turn1", "rows.jsonl:1#turn3"]
    assert [refusal[:2] for refusal in shown.refusals] == [("rows.jsonl:1#turn5", "too_long")]
    assert opened.row("rows.jsonl:1#turn5") == opened.row("rows.jsonl:1")
    (only,) = opened.show(opened.row("rows.jsonl:1#turn3"))
    assert [document.row_id for document in only.documents] == ["rows.jsonl:1#turn3"]
    first, second = shown.documents
    assert second.shared >= 16 and first.pack == second.pack and first.pack is not None
    own = next(item for item in first.pack.documents if item.example == second.example)
    assert (own.shared, own.tokens) == (second.shared, len(second.ids) - second.shared)
    assert f"behind {own.shared} shared ones" in pack_line(first.pack, second, 100)


def test_other_formats_are_shown_by_what_they_say(prepared: Prepared) -> None:
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}, gladly.", "rejected": "No."} for n in range(40)]
    opened = prepared.prepare(*pairs, format="preference").open()
    (shown,) = opened.show(opened.example(0))
    said = [(item.role, dict(item.notes).get("answer")) for item in shown.said]
    assert said == [("user", None), ("assistant", "chosen"), ("assistant", "rejected")]
    assert shown.kind == "pair" and len(shown.documents) == 2 and shown.warnings == ()
    assert shown.documents[0].pack == shown.documents[1].pack


def test_a_source_that_was_changed_is_seen(prepared: Prepared) -> None:
    opened = prepared.prepare(*(row(number) for number in range(40))).open()
    (prepared.folder / "rows.jsonl").write_text("".join(json.dumps(row(n, "Changed.")) + "\n" for n in range(40)))
    (shown,) = opened.show(opened.example(3))
    assert "its tokens are not those of the store" in shown.warnings[0]


def synthetic(folder: Path) -> TokenStore:
    """Two sources; a third of the rows has three documents that share 20 tokens, one after another."""
    random = np.random.default_rng(5)
    with TokenStoreWriter(folder) as writer:
        for number in range(150):
            for part in range(3 if number % 3 == 0 else 1):
                ids = random.integers(0, 90, int(random.integers(24, 40)))
                weights = np.where(np.arange(len(ids)) < 21, 0.0, 1.0)
                name = "a" if number < 100 else "b"
                example = TokenizedExample(ids, weights, name, f"{name}.jsonl:{number + 1}#turn{part}")
                writer.add(example, shared=20 if part else 0, row=(0, number))
    return TokenStore(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_prefixes": False},
        {"shuffle_window": 20, "seed": 3},
        {"epochs": 1.0, "steps": None},
        {"mixture": {"sources": {"a": {"weight": 1.0}, "b": {"weight": 3.0}}}, "steps": 300},
        {"mixture": {"sources": {"a": {"weight": [[1, 0.1], [60, 3.0]]}, "b": {"weight": 1.0}}}, "steps": 300},
    ],
    ids=str,
)
def test_the_pack_is_the_one_that_the_loader_builds(tmp_path: Path, changes: dict[str, Any]) -> None:
    store, train = synthetic(tmp_path), TrainConfig.model_validate({**TRAIN, **changes})
    packs, note = locate(store, train, set(range(len(store))))
    assert (len(packs), note) == (len(store), "")
    seen: dict[int, tuple[int, list[tuple[int, int, int]]]] = {}
    feed = feed_for(store, train)
    with PackedLoader(feed, row_tokens=train.row_tokens, rows_per_step=2, packing_buffer=8, background=False) as loader:
        while len(seen) < len(store) and (step := loader.next_step()):
            for batch in step.micro_batches:
                ends = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
                laid = [(example, *slots) for example, slots in zip(batch.document_ids.tolist(), ends, strict=True)]
                real = [document for document in laid if document[0] >= 0]
                for example, _, _ in real:
                    seen.setdefault(example, (step.step, real))
    for example, pack in packs.items():
        documents = [(item.example, item.begin, item.begin + item.tokens) for item in pack.documents]
        assert (pack.step, documents) == seen[example]
        assert pack.used == sum(end - begin for _, begin, end in documents)
        assert 1 <= pack.row <= pack.rows <= 2
    assert any(item.shared for pack in packs.values() for item in pack.documents) == train.share_prefixes


def test_what_the_run_never_reaches_is_said(tmp_path: Path) -> None:
    store = synthetic(tmp_path)
    packs, note = locate(store, TrainConfig.model_validate({**TRAIN, "steps": 3}), set(range(len(store))))
    assert 0 < len(packs) < len(store) and max(pack.step for pack in packs.values()) == 3
    assert note.startswith("not in the first 3 steps of the run")


TEXTS = ["plain words", "漢字 🎉 and é", " two  spaces\n\n\ttab", "🦥🦥", "half \ufffd known"]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "phi-3-mini"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(request: pytest.FixtureRequest, chatml_folder: Path, name: str, text: str) -> None:
    if name == "chatml":
        folder = chatml_folder
    else:
        folder = request.getfixturevalue("real_data") / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"no tokenizer {name} in the real data")
    tokenizer = ChatTokenizer(folder)
    ids = tokenizer.encode(text).ids.tolist()
    pieces = spell(tokenizer, ids)
    # U+FFFD itself, cut among tokens, looks like bytes that make no character: it shows once for each token.
    spelt = re.sub("\ufffd+", "\ufffd", "".join(piece.text for piece in pieces))
    assert spelt == tokenizer.decode(ids, skip_special_tokens=False)
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == len(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_byte_that_makes_no_character_stands_alone(chatml: ChatTokenizer) -> None:
    ids = chatml.encode("🦥").ids.tolist()
    assert len(ids) > 1, "the embedded vocabulary has no such character"
    pieces = spell(chatml, [ids[0], *chatml.encode("ab").ids.tolist()])
    assert pieces[0].text == "\ufffd" and "".join(piece.text for piece in pieces[1:]) == "ab"


def test_nothing_in_a_text_hides_or_acts() -> None:
    assert visible("a\x1b[31m\u202eb\u200d\r\x9b\ud83d\u2028") == (
        "a⟦U+001B⟧[31m⟦U+202E⟧b⟦U+200D⟧⟦U+000D⟧⟦U+009B⟧⟦U+D83D⟧⟦U+2028⟧"
    )
    assert visible("a\tb\n") == "a⇥b↵\n" and visible("a\nb", lines=False) == "a\nb"
    assert visible("  ") == "··" and visible(" a b") == " a b" and visible("漢\u3000é🎉") == "漢\u3000é🎉"


@pytest.mark.parametrize(
    ("row_id", "own"),
    [("a.jsonl:3", "a.jsonl:3"), ("a:b#c.jsonl:3#turn1#part0", "a:b#c.jsonl:3"), ("o/n:7#chosen", "o/n:7"), ("x", "x")],
)
def test_the_row_of_a_document(row_id: str, own: str) -> None:
    assert own_id(row_id) == own
