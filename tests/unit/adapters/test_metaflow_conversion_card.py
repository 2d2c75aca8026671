"""The card of a conversion: what an agent wrote is shown, and is no markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from posttrain_lib.adapters.metaflow_conversion_card import fill_conversion
from posttrain_lib.lineage.graph import Graph
from posttrain_lib.schema.manifests import StepManifest

PICTURE = "![x](http://elsewhere.example/p.png)<img src='http://elsewhere.example/p.png'>"


@pytest.mark.parametrize("found", [True, False])
def test_no_word_of_an_agent_leaves_its_block(tmp_path: Path, found: bool) -> None:
    family = tmp_path / "family.py"
    family.write_text(f'"""A family.\n```\n\n{PICTURE}\n"""\n    indented = 1', encoding="utf-8")
    attempts = [{"number": 1, "seconds": 1.0, "note": PICTURE, "summary": PICTURE}]
    metrics = {"agent": "search", "attempts": attempts, "reason": f"none fits\n\n{PICTURE}"}
    manifest = StepManifest("propose_family", 1, "k", {}, {}, {}, {}, (), metrics, {}, {}, "2026-01-01", 0.0)
    outputs = {"family": str(family), "test": "test_family.py"} if found else {}
    card: list[Any] = []
    summary = {"name": "n", "model": "m", "passed": found, "outputs": outputs}
    fill_conversion(card, summary, {"propose_family": manifest}, Graph((), {}))
    drawn = [part._text for part in card if hasattr(part, "_text")]
    html = [MarkdownIt("commonmark").render(one) for one in drawn if "data:image/svg" not in one]
    assert not [one for one in html if "<img" in one]
    assert any("![x](http" in one for one in html)
    assert any("    indented = 1" in one for one in html) == found
