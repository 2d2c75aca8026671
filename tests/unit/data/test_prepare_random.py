"""Whatever the rows and the settings: the receipt's counts add up, and every row is found where they say it is."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.train import TrainConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.inspection import REFUSED, Inspection
from posttrain_lib.data.inspection_view import own_id
from posttrain_lib.data.prepare import HELD_OUT, QUARANTINE, TRAIN, prepare_dataset
from posttrain_lib.data.receipt import Receipt
from posttrain_lib.data.token_store import TokenStore

#: prints an answer otherwise once another follows, so that a conversation becomes several documents
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}* {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n* {% endif %}"
)


def asked(number: int, *answers: dict[str, Any]) -> str:
    turns = [
        turn
        for place, answer in enumerate(answers)
        for turn in ({"role": "user", "content": f"How is {number} at {place}?"}, {"role": "assistant", **answer})
    ]
    return json.dumps({"messages": turns})


SAID = st.sampled_from(
    [{"content": "Fine."}, {"content": "word " * 40}, {"content": "No.", "train": False}, {"content": ""}]
)
ROW = st.one_of(
    st.builds(lambda number, said: asked(number, *said), st.integers(0, 9), st.lists(SAID, min_size=1, max_size=3)),
    st.sampled_from(['{"messages": 1}', "{", "null", "[]", '{"a": 1, "a": 2}', asked(1, {"content": "<|im_end|>"})]),
)
#: some rows that stay, whatever is drawn
KEPT = [asked(100 + number, {"content": "Fine."}) for number in range(12)]
SETTINGS = st.fixed_dictionaries(
    {
        "over_length": st.sampled_from(["refuse", "truncate_right", "truncate_left", "split"]),
        "trained_turns": st.sampled_from(["each", "last"]),
        "train_on": st.sampled_from(["all", "last"]),
        "control_tokens": st.sampled_from(["refuse", "as_text"]),
        "deduplicate": st.booleans(),
        "max_example_tokens": st.sampled_from([40, 60, 500]),
    }
)


class Prepared:
    """Two sources, prepared."""

    def __init__(self, folder: Path, tokenizer: Path, rows: dict[str, list[str]], options: dict[str, Any]) -> None:
        (folder / "template.jinja").write_text(REWRITES)
        self.inputs = {name: str(folder / f"{name}.jsonl") for name in rows}
        for name, lines in rows.items():
            Path(self.inputs[name]).write_text("".join(f"{line}\n" for line in lines))
        raw = {"sources": [{"name": name, "path": path} for name, path in self.inputs.items()], **options}
        raw |= {"workers": 0, "max_refused_fraction": 0.9, "held_out": {"fraction": 0.3}}
        self.config = DataConfig.model_validate({**raw, "chat_template": str(folder / "template.jinja")})
        self.out = folder / "out"
        self.out.mkdir()
        self.receipt: Receipt = prepare_dataset(
            self.config,
            tokenizer_folder=tokenizer,
            inputs=self.inputs,
            out_dir=self.out,
            rejects_dir=folder / "rejects",
            progress=lambda text: None,
        )
        self.stores = {name: TokenStore(self.out / name) for name in (TRAIN, HELD_OUT)}
        lines = (self.out / QUARANTINE).read_text("utf-8").split("\n")
        self.quarantine = [json.loads(line) for line in lines if line]
        made = ChatTokenizer(tokenizer, chat_template=self.config.chat_template)
        train = TrainConfig.model_validate({"steps": 9, "row_tokens": 512, "rows_per_step": 2})
        self.inspection = Inspection(self.out, self.config, train, made, self.inputs)

    def rows_in(self, split: str) -> set[tuple[str, str]]:
        store = self.stores[split]
        return {(store.source(number), own_id(store.row_id(number))) for number in range(len(store))}


@settings(max_examples=15)
@given(first=st.lists(ROW, min_size=1, max_size=12), second=st.lists(ROW, max_size=6), options=SETTINGS)
def test_the_counts_add_up(chatml_folder: Path, first: list[str], second: list[str], options: dict[str, Any]) -> None:
    rows = {"one": first, "two": [*KEPT, *second]}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Prepared(Path(folder), chatml_folder, rows, options)
        receipt, notes = prepared.receipt, prepared.receipt.notes
        train, held_out = (prepared.rows_in(split) for split in (TRAIN, HELD_OUT))
        refused = {(record["source"], own_id(record["row_id"])) for record in prepared.quarantine}
        everything = {
            (name, f"{name}.jsonl:{number}") for name, lines in rows.items() for number in range(1, len(lines) + 1)
        }
        assert not train & held_out and train | held_out | refused == everything
        assert {name: receipt.sources[name]["rows"] for name in rows} == {n: len(lines) for n, lines in rows.items()}
        reasons = Counter(record["reason"] for record in prepared.quarantine)
        left_out = Counter({name.removeprefix("left_out_"): n for name, n in notes.items() if name in noted(reasons)})
        assert reasons == receipt.refused + left_out
        assert receipt.total("refused") == receipt.refused.total()
        assert receipt.total("examples") == sum(map(len, prepared.stores.values()))
        assert receipt.total("held_out") == len(prepared.stores[HELD_OUT])
        assert all(check.passed for check in receipt.checks() if check.name == "no token is lost")
        for record in prepared.quarantine:
            found = prepared.inspection.row(f"{record['source']}: {record['row_id']}")
            shown = prepared.inspection.show(found)
            assert (record["row_id"], record["reason"], record["detail"]) in shown[0].refusals
            in_store = (record["source"], own_id(record["row_id"])) in train | held_out
            assert (found[0].split == REFUSED) == (not in_store)


def noted(reasons: Counter[str]) -> set[str]:
    return {f"left_out_{reason}" for reason in reasons}
