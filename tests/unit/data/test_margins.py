"""A pair's margin, from the row through store or stream to the reward loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.objectives import Reward
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.fingerprint import fingerprint
from posttrain_lib.data.live_feed import LiveFeed, LiveSpec
from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.prepare import prepare_dataset
from posttrain_lib.data.sources import list_files, pinned
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.contract import outcome_of, pack, write_examples
from posttrain_lib.losses.reward import RewardLoss
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample
from posttrain_lib.training.checks import check_margins
from tests.support.score_decoder import score_decoder

MARGINS = (0.7, None, 2.5, 0.0, None, -0.4)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_examples(tmp_path_factory.mktemp("without") / "store", "pair", seed=0)


@pytest.fixture(scope="module")
def store(without: TokenStore) -> TokenStore:
    """The same pairs with margins."""
    folder = without.folder.parent / "with"
    with TokenStoreWriter(folder) as writer:
        for example in range(len(without)):
            made = TokenizedExample(*without.get(example), without.source(example), without.row_id(example))
            shared, row = int(without.shared[example]), (0, example // 2)
            writer.add(made, kind="pair", shared=shared, row=row, margin=MARGINS[example // 2])
    return TokenStore(folder)


def losses_of(loss: RewardLoss, batches: list[PackedBatch]) -> list[float]:
    items = outcome_of(loss, score_decoder(), batches).items
    return [float(items[example][0]) for example in sorted(items)]


def test_the_loss_subtracts_the_weighed_margin(store: TokenStore, without: TokenStore) -> None:
    batches = pack(store, [(3, 0, 4), (1, 5, 2)], 1, share=True)
    apart = -torch.tensor(losses_of(RewardLoss(), batches), dtype=torch.float64).exp().sub(1).log()
    wanted = apart - 0.5 * torch.tensor([margin or 0.0 for margin in MARGINS], dtype=torch.float64)
    expected = -torch.nn.functional.logsigmoid(wanted)
    found = losses_of(RewardLoss(margin_weight=0.5), batches)
    # The store's float32 margins: 1e-7 of each; getting the difference of scores out of the loss loses less.
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    plain = pack(without, [(3, 0, 4), (1, 5, 2)], 1, share=True)
    assert losses_of(RewardLoss(), batches) == losses_of(RewardLoss(), plain)
    assert losses_of(RewardLoss(margin_weight=0.5), plain) == losses_of(RewardLoss(), plain)


def test_a_batch_has_margins_where_a_segment_has_one(store: TokenStore, without: TokenStore) -> None:
    said, unsaid = pack(store, [(2, 1), (4,)], 1)
    assert said.margins.dtype == np.float32
    nan = float("nan")
    assert np.array_equal(said.margins[:4], np.float32([2.5, 2.5, nan, nan]), equal_nan=True)
    assert len(said.margins) == len(said.document_ids) and np.isnan(said.margins[4:]).all(), "padding has none"
    assert unsaid.margins is None and pack(without, [(2,)], 1)[0].margins is None
    assert said.map(lambda array: array + 1).margins[0] == 3.5 and unsaid.map(lambda array: array).margins is None


def test_data_without_a_margin_is_refused(store: TokenStore, without: TokenStore) -> None:
    name, options = Reward(margin_weight=0.5).loss()
    wanting = build_loss(name, options)
    check_margins(store, wanting)
    check_margins(without, build_loss(*Reward().loss()))
    with pytest.raises(DataError, match="no pair has one") as caught:
        check_margins(without, wanting)
    assert "margin_weight" in str(caught.value) and str(without.folder) in str(caught.value)


def _row(number: int) -> dict[str, Any]:
    answers = {name: f"{name} {'word ' * (1 + (number * factor) % 9)}" for name, factor in (("yes", 3), ("no", 5))}
    row = {"prompt": f"What of {number}?", "chosen": answers["yes"], "rejected": answers["no"]}
    return row if number % 3 == 0 else {**row, "lead": number / 7}


def test_raw_rows_give_the_margins_of_the_prepared_store(tmp_path: Path, chatml_folder: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(_row(number)) + "\n" for number in range(60)), encoding="utf-8")
    path = pinned(str(rows))
    source = {"name": "pairs", "path": path, "format": "preference", "fields": {"margin": "lead"}}
    config = DataConfig.model_validate({"sources": [source], "max_example_tokens": 256, "workers": 0})
    out = tmp_path / "out"
    out.mkdir()
    prepare_dataset(
        config,
        tokenizer_folder=chatml_folder,
        inputs={"pairs": path},
        out_dir=out,
        rejects_dir=tmp_path / "rejects",
        progress=lambda text: None,
    )
    files = (tuple(list_files(path, FileDigests())),)
    spec = LiveSpec(config, str(chatml_folder), files, fingerprint(ChatTokenizer(chatml_folder)))
    settings = {"row_tokens": 256, "window": 20, "seed": 3}
    found = []
    for feed in (StoreFeed(TokenStore(out / "train"), **settings), LiveFeed(spec, **settings)):
        with PackedLoader(feed, row_tokens=256, rows_per_step=2, packing_buffer=8) as loader:
            steps = [loader.next_step() for _ in range(6)]
        batches = [batch for step in steps if step is not None for batch in step.micro_batches]
        found.append(
            [(batch.token_ids.tolist(), None if batch.margins is None else batch.margins) for batch in batches]
        )
    assert len(found[0]) == len(found[1]) and any(margins is not None for _, margins in found[0])
    for (tokens, stored), (others, live) in zip(*found, strict=True):
        assert tokens == others
        assert np.array_equal(stored, live, equal_nan=True) if stored is not None else live is None
