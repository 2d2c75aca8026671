"""A preparation of rows, on disks and with names as they are met: whole or not at all, and an error of ours."""

from __future__ import annotations

import datetime
import decimal
import errno
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.test_prepare import Preparation, row


@pytest.fixture
def preparation(tmp_path: Path, chatml_folder: Path) -> Preparation:
    return Preparation(tmp_path, chatml_folder)


def test_a_quarantine_that_was_copied_in_part_is_none(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at the refused rows would take it for all of them."""

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-9])
        raise OSError(errno.ENOSPC, "No space left on device")

    preparation.write(*("{" for _ in range(3)), *(row(number) for number in range(97)))
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        preparation.run()
    assert not (preparation.rejects / "quarantine.jsonl").exists()


def test_prompts_beside_what_json_does_not_have(preparation: Preparation) -> None:
    """Columns of Parquet are times, bytes and decimals, too."""
    asked = [f"What is {number}?" for number in range(50)]
    made = datetime.datetime(2026, 1, 2, 3, 4, 5)
    table = {"prompt": asked, "made": [made] * 50, "image": [b"\xff"] * 50, "price": [decimal.Decimal("1.50")] * 50}
    pq.write_table(pa.table(table), preparation.folder / "rows.parquet")
    source = {"name": "file", "path": "rows.parquet", "format": "prompts"}
    preparation.run(sources=[source])
    lines = preparation.lines("train_prompts.jsonl") + preparation.lines("prompts.jsonl")
    assert len(lines) == 50
    assert lines[0]["extra"] == {"made": "2026-01-02 03:04:05", "image": "b'\\xff'", "price": "1.50"}
