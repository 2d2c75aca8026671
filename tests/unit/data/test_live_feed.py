"""Tokenising on the fly: the stream of a prepared store, resumed exactly, nothing lost, nothing twice."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.fingerprint import fingerprint
from posttrain_lib.data.live_feed import QUARANTINE, LiveFeed, LiveSpec, Quarantine
from posttrain_lib.data.live_rows import At
from posttrain_lib.data.loader import LoadedStep, PackedLoader
from posttrain_lib.data.prepare import prepare_dataset
from posttrain_lib.data.sources import list_files, pinned
from posttrain_lib.data.store_feed import MixtureSpec, SourceShare, StoreFeed
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import CheckpointError, DataError
from posttrain_lib.lineage.digests import FileDigests

ROW_TOKENS = 256
WINDOW = 40
SOURCES = ("one", "two")


def _row(name: str, number: int) -> dict[str, Any]:
    words = "word " * (1 + (number * 7) % 23)
    turns = [
        {"role": "user", "content": f"What do you say to {name} {number} today?"},
        {"role": "assistant", "content": words},
    ]
    if number % 4 == 0:  # two turns, and reasoning: templates that rewrite make two documents of it
        turns[1]["reasoning_content"] = "I think."
        turns += [
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "So.", "reasoning_content": "m"},
        ]
    if number % 29 == 5:
        turns = turns[:1]  # no answer: refused
    return {"messages": turns}


class Data:
    """Two sources in three files, one of them compressed; the same rows prepared and not."""

    def __init__(self, folder: Path, tokenizer: Path, template: Path | None = None) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        rows = {name: [json.dumps(_row(name, number)) + "\n" for number in range(150)] for name in SOURCES}
        (folder / "one").mkdir()
        (folder / "one" / "a.jsonl").write_text("".join(rows["one"][:90]))
        (folder / "one" / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows["one"][90:]).encode()))
        (folder / "two.jsonl").write_text("".join(rows["two"]) + "no json\n")
        self.paths = {"one": pinned(str(folder / "one" / "*")), "two": pinned(str(folder / "two.jsonl"))}
        self.config = DataConfig.model_validate(
            {
                "sources": [{"name": name, "path": path} for name, path in self.paths.items()],
                "held_out": {"fraction": 0.1},
                "chat_template": None if template is None else str(template),
                "max_refused_fraction": 0.2,
                "max_example_tokens": ROW_TOKENS,
                "workers": 0,
            }
        )

    def spec(self) -> LiveSpec:
        known = FileDigests()
        files = tuple(tuple(list_files(path, known)) for path in self.paths.values())
        tokenizer = ChatTokenizer(self.tokenizer, chat_template=self.config.chat_template)
        return LiveSpec(self.config, str(self.tokenizer), files, fingerprint(tokenizer))

    def store(self) -> TokenStore:
        prepare_dataset(
            self.config,
            tokenizer_folder=self.tokenizer,
            inputs=self.paths,
            out_dir=self.folder / "out",
            rejects_dir=self.folder / "rejects",
            progress=lambda text: None,
        )
        return TokenStore(self.folder / "out" / "train")

    def live(self, **options: Any) -> LiveFeed:
        return LiveFeed(self.spec(), **{"row_tokens": ROW_TOKENS, "window": WINDOW, "seed": 3, **options})


@pytest.fixture
def data(tmp_path: Path, chatml_folder: Path) -> Data:
    (tmp_path / "out").mkdir()
    return Data(tmp_path, chatml_folder)


def _loader(feed: Any, **options: Any) -> PackedLoader:
    return PackedLoader(feed, **{"row_tokens": ROW_TOKENS, "rows_per_step": 4, "packing_buffer": 16, **options})


def _stream(steps: list[LoadedStep]) -> list[str]:
    """A hash of every step's tokens, weights, positions and boundaries, and of its global figures."""
    found = []
    for step in steps:
        seen = hashlib.sha256(repr((step.step, step.global_weight, step.real_tokens)).encode())
        for batch in step.micro_batches:
            for name in ("token_ids", "target_ids", "loss_weights", "positions", "cu_seqlens", "document_sources"):
                seen.update(getattr(batch, name).tobytes())
        found.append(seen.hexdigest())
    return found


def _take(loader: PackedLoader, steps: int) -> list[LoadedStep]:
    with loader:
        return [step for _ in range(steps) if (step := loader.next_step()) is not None]


def _take_some(loader: PackedLoader, steps: int) -> None:
    for _ in range(steps):
        loader.next_step()


#: ChatML that drops the reasoning of earlier turns, as Qwen3's template does
_REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_raw_rows_give_the_stream_of_the_prepared_store(
    tmp_path: Path, chatml_folder: Path, mixed: bool, share_prefixes: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "rewriting.jinja").write_text(_REWRITING)
    data = Data(tmp_path, chatml_folder, tmp_path / "rewriting.jinja")
    shares = {"one": SourceShare(weight=3.0), "two": SourceShare(weight=1.0)}
    mixture = MixtureSpec(by="tokens", sources=shares) if mixed else None
    options: dict[str, Any] = {"mixture": mixture, "share_prefixes": share_prefixes, "window": WINDOW, "seed": 3}
    store = data.store()
    assert store.shared.max() >= 16  # there is something to share
    prepared = StoreFeed(store, row_tokens=ROW_TOKENS, **options)
    wanted = _stream(_take(_loader(prepared), 25))
    assert len(set(wanted)) == 25
    assert _stream(_take(_loader(data.live(**options)), 25)) == wanted


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same(data: Data, workers: int) -> None:
    alone = _stream(_take(_loader(data.live(), background=False), 12))
    assert _stream(_take(_loader(data.live(workers=workers)), 12)) == alone


@pytest.mark.parametrize("cut", [0, 1, 3, 7, 12])
def test_resumed_equals_uninterrupted(data: Data, cut: int) -> None:
    whole = _stream(_take(_loader(data.live()), 16))
    first = _loader(data.live())
    taken = _stream(_take(first, cut))
    state = json.loads(json.dumps(first.state()))
    again = _loader(data.live())
    again.load_state(state)
    assert taken + _stream(_take(again, 16 - cut)) == whole
    assert len(json.dumps(state)) < 5000


def test_a_closed_loader_goes_on_where_it_stood(data: Data) -> None:
    whole = _stream(_take(_loader(data.live()), 6))
    loader = _loader(data.live())
    assert _stream(_take(loader, 3)) + _stream(_take(loader, 3)) == whole


def test_another_number_of_ranks_goes_on_with_the_same_rows(data: Data) -> None:
    def rows(loaders: list[PackedLoader], steps: int) -> list[list[bytes]]:
        taken = [_take(loader, steps) for loader in loaders]
        return [
            sorted(
                batch.token_ids[begin : begin + ROW_TOKENS].tobytes()
                for steps_of_rank in taken
                for batch in steps_of_rank[number].micro_batches
                for begin in range(0, batch.num_tokens, ROW_TOKENS)
            )
            for number in range(steps)
        ]

    whole = rows([_loader(data.live(), rows_per_step=8)], 9)
    loaders = [_loader(data.live(), rows_per_step=8, rank=rank, world=4) for rank in range(4)]
    found = rows(loaders, 3)
    for world in (2, 8):
        state = loaders[0].state()
        loaders = [_loader(data.live(), rows_per_step=8, rank=rank, world=world) for rank in range(world)]
        for loader in loaders:
            loader.load_state(state)
        found += rows(loaders, 3)
    assert found == whole


def test_every_row_once_a_pass_and_every_refused_one_counted(data: Data, tmp_path: Path) -> None:
    feed = data.live(epochs=1, quarantine=tmp_path / "work")
    steps = _take(_loader(feed), 1000)
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    documents = Counter(
        feed.name_example(int(example)).split("#")[0]
        for step in steps
        for batch in step.micro_batches
        for example in batch.document_ids
        if example >= 0
    )
    lines = [json.loads(line) for line in (tmp_path / "work" / QUARANTINE).read_text().splitlines()]
    refused = [f"{line['source']}: {line['row_id']}" for line in lines]
    counts = steps[-1].rows
    assert counts["rows"] == 301 and len(refused) == len(set(refused)) == counts["refused"] == 11
    assert not set(refused) & set(documents)
    assert len(documents) + len(refused) + counts["held_out"] == 301
    assert {line["reason"] for line in lines} == {"broken_json", "no_assistant_turn"}


def test_an_interrupted_run_counts_like_a_whole_one(data: Data, tmp_path: Path) -> None:
    wanted = _take(_loader(data.live(epochs=1, quarantine=tmp_path / "whole")), 1000)[-1].rows
    dead = _loader(data.live(epochs=1, quarantine=tmp_path / "work"))
    _take(dead, 3)  # killed before it had a checkpoint
    first = _loader(data.live(epochs=1, quarantine=tmp_path / "work"))
    _take(first, 6)  # what works ahead has passed more rows than that
    loader = _loader(data.live(epochs=1, quarantine=tmp_path / "work"))
    loader.load_state(first.state())
    assert _take(loader, 1000)[-1].rows == wanted
    texts = [(tmp_path / run / QUARANTINE).read_text() for run in ("whole", "work")]
    assert texts[0] == texts[1] != ""


def test_a_quarantine_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    """By a kill in the middle of a line: of a character, too."""
    quarantine = Quarantine(tmp_path / QUARANTINE)
    for number in range(2):
        quarantine.add(0, At(0, 0, number), "one", f"r{number}", "why", "日本語", {"text": "日本語"})
    whole = quarantine.path.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for end in range(len(first), len(whole)):
        quarantine.path.write_bytes(whole[:end])
        quarantine.go_to([At(0, 0, 2)])
        assert quarantine.path.read_bytes() == first


def test_the_quarantine_of_a_run_that_ends_holds_what_it_consumed(data: Data, tmp_path: Path) -> None:
    feed = data.live(quarantine=tmp_path)
    loader = _loader(feed)
    rows = _take(loader, 5)[-1].rows
    feed.consumed(loader.state())
    assert len((tmp_path / QUARANTINE).read_text().splitlines()) == rows["refused"] > 0


def _with_rows(data: Data, name: str, rows: list[dict[str, Any]]) -> None:
    (data.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_source_without_anything_to_train_on_does_not_hold_the_others_up(data: Data) -> None:
    useless = [_row("two", number) for number in range(20)]
    for row in useless:
        row["messages"] = [{**message, "train": False} for message in row["messages"] if message["role"] != "user"]
        row["messages"] = [{"role": "user", "content": "Hm?"}, row["messages"][0]] if row["messages"] else []
    _with_rows(data, "two", useless)
    even = MixtureSpec(sources={name: SourceShare(weight=1.0) for name in SOURCES})
    feed = data.live(mixture=even)
    steps = _take(_loader(feed), 5)
    assert len(steps) == 5 and all(step.source_units[1] == 0 for step in steps)


def test_a_source_without_anything_to_train_on_still_counts_for_the_order(data: Data) -> None:
    _with_rows(data, "two", [{"messages": []}] * 70)
    object.__setattr__(data.config, "max_refused_fraction", 0.9)
    prepared = StoreFeed(data.store(), row_tokens=ROW_TOKENS, window=WINDOW, seed=3)
    found = [step.micro_batches[0].token_ids.tobytes() for step in _take(_loader(data.live()), 8)]
    assert found == [step.micro_batches[0].token_ids.tobytes() for step in _take(_loader(prepared), 8)]


def test_data_that_moved_is_the_same_data(data: Data, tmp_path: Path) -> None:
    state = _loader(data.live()).state()
    (tmp_path / "elsewhere").mkdir()
    for name in ("one", "two.jsonl"):
        (data.folder / name).rename(tmp_path / "elsewhere" / name)
    data.paths = {
        "one": pinned(str(tmp_path / "elsewhere/one/*")),
        "two": pinned(str(tmp_path / "elsewhere/two.jsonl")),
    }
    _loader(data.live()).load_state(state)


def test_other_settings_are_another_run(data: Data) -> None:
    state = _loader(data.live()).state()
    data.config = data.config.model_copy(update={"train_on": "last"})
    with pytest.raises(CheckpointError, match="train_on"):
        _loader(data.live()).load_state(state)


def test_a_datasets_folder_is_read_as_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([_row("a", number) for number in range(1, 4)]).save_to_disk(str(tmp_path / "saved"))
    found = list_files(str(tmp_path / "saved"), FileDigests())
    assert len(found) == 1 and found[0][0].endswith("saved") and len(found[0][1]) == 64


def test_a_file_that_changed_under_a_checkpoint_is_named(data: Data) -> None:
    state = _loader(data.live()).state()
    with (data.folder / "two.jsonl").open("a") as handle:
        handle.write(json.dumps(_row("two", 999)) + "\n")
    with pytest.raises(CheckpointError, match=r"two\.jsonl"):
        _loader(data.live()).load_state(state)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_file_that_is_replaced_while_training_goes_on_is_named(data: Data, steps: int) -> None:
    """Before it was opened, or between two passes: what is trained on would not be what the run is known by."""
    with pytest.raises(DataError, match="changed while") as caught, _loader(data.live()) as loader:
        _take_some(loader, steps)
        _with_rows(data, "two", [_row("other", number) for number in range(150)])
        _take_some(loader, 200)
    assert str(caught.value.where).endswith("two.jsonl")


def test_a_file_of_a_store_that_is_replaced_while_training_goes_on_is_named(data: Data) -> None:
    with fsspec.open("memory://live/rows.jsonl", "wb") as handle:
        handle.write((data.folder / "two.jsonl").read_bytes())
    data.paths["two"] = "memory://live/rows.jsonl"
    with pytest.raises(DataError, match="changed while") as caught, _loader(data.live()) as loader:
        _take_some(loader, 2)
        with fsspec.open("memory://live/rows.jsonl", "wb") as handle:
            handle.write((data.folder / "two.jsonl").read_bytes())
        _take_some(loader, 200)
    assert str(caught.value.where).endswith("rows.jsonl")


def test_too_many_refused_rows_stop_the_training(data: Data) -> None:
    rows = [json.dumps(_row("two", number)) if number % 3 else "broken" for number in range(1500)]
    (data.folder / "two.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="rows were refused") as caught, _loader(data.live()) as loader:
        for _ in range(300):
            loader.next_step()
    assert "broken_json" in str(caught.value)


def test_a_killed_worker_loses_and_repeats_nothing(data: Data) -> None:
    wanted = _stream(_take(_loader(data.live()), 12))
    feed = data.live(workers=2)
    found = []
    with _loader(feed) as loader:
        for number in range(12):
            step = loader.next_step()
            assert step is not None
            found.append(step)
            if number == 2:
                processes = feed._pool._executor._processes
                os.kill(next(iter(processes)), signal.SIGKILL)
    assert _stream(found) == wanted


def test_documents_are_named(data: Data) -> None:
    feed = data.live()
    step = _take(_loader(feed), 1)[0]
    names = {feed.name_example(int(e)) for batch in step.micro_batches for e in batch.document_ids if e >= 0}
    assert all(name.startswith(("one: a.jsonl:", "one: b.jsonl.gz:", "two: two.jsonl:")) for name in names)
    assert np.all([batch.document_sources.max() < 2 for batch in step.micro_batches])
    assert dataclasses.asdict(data.spec())["fingerprint"].keys() == {"tokenizer", "template"}


def test_rows_of_files_of_one_name_are_told_apart(data: Data) -> None:
    for folder, rows in (("x", range(1, 4)), ("y", range(6, 9))):
        (data.folder / folder).mkdir()
        (data.folder / folder / "same.jsonl").write_text("".join(json.dumps(_row(folder, n)) + "\n" for n in rows))
    data.paths["two"] = pinned(str(data.folder / "[xy]" / "same.jsonl"))
    feed = data.live(epochs=1)
    names = {
        feed.name_example(int(example))
        for step in _take(_loader(feed), 100)
        for batch in step.micro_batches
        for example in batch.document_ids
        if example >= 0
    }
    assert {"two: x/same.jsonl:1", "two: y/same.jsonl:1"} <= names
