"""``python -m steps.prepare_data inspect``: the mask in colour, a page that needs nothing, and errors that say what."""

from __future__ import annotations

import fcntl
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.inspection_view import visible
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.lineage.store import Store
from posttrain_lib.models.scratch import write_scratch_model
from posttrain_lib.schema.manifests import StepManifest
from steps import inspect_data, pipeline
from steps.inspect_data import coloured, open_prepared, print_row

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "</span><script>alert(1)</script>\x1b[31m & <img src=https://x.example/y onerror=alert(2)>"
SAID = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE, "weight": 0.5}]
ROWS = [
    {"messages": SAID, "group": "in training"},  # by the hash of that name
    {"messages": [{"role": "robot", "content": HOSTILE}]},
]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file with few rows, the first two of them hostile, and a model of a few thousand parameters."""
    root = tmp_path_factory.mktemp("run")
    made = list(generate_rows(40, 0))
    texts = [turn["content"] for row in made for turn in row["messages"]]
    build_tokenizer(texts, 320, root / "tokenizer")
    architecture = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 512,
    }  # fmt: skip
    write_scratch_model("qwen3", architecture, root / "tokenizer", 0, root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *made]), encoding="utf-8")
    config = {
        "name": "test",
        "data": {
            "sources": [{"name": "chat", "path": str(root / "rows.jsonl")}],
            "max_example_tokens": 512,
            "max_refused_fraction": 0.1,
        },
        "model": {"path": str(root / "model")},
        "train": {"steps": 20, "row_tokens": 512, "rows_per_step": 2, "packing_buffer": 4},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return root / "run.yaml"


@pytest.fixture(scope="module")
def prepared(run_file: Path) -> Iterator[Path]:
    """The run file, its data prepared in a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_STORE", str(run_file.parent / "store"))
        pipeline.main("prepare_data", ["--config", str(run_file)])
        yield run_file


def inspect(capsys: pytest.CaptureFixture[str], run_file: Path, *arguments: str) -> str:
    capsys.readouterr()
    inspect_data.main(["--config", str(run_file), *arguments])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], run_file: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        inspect(capsys, run_file, *arguments)
    assert caught.value.code == 1
    return capsys.readouterr().err


def store_of(run_file: Path) -> TokenStore:
    (folder,) = run_file.parent.glob("store/steps/prepare_data/*/train")
    return TokenStore(folder)


def green(text: str) -> list[tuple[str, bool]]:
    """(text, whether it is green) of what a terminal was sent."""
    parts, colours = [], set[str]()
    for codes, shown in re.findall(r"(?:\x1b\[([0-9;]*)m)?([^\x1b]*)", text):
        if codes:
            colours = set() if codes == "0" else set(codes.split(";"))
        if shown:
            parts.append((shown, "32" in colours))
    return parts


def test_exactly_the_trained_tokens_are_green(prepared: Path) -> None:
    store, opened = store_of(prepared), open_prepared(pipeline.load_run_config(prepared), "")
    tokenizer = ChatTokenizer(prepared.parent / "tokenizer")
    for example in (0, 1, 5, len(store) - 1):
        (shown,) = opened.show(opened.example(example))
        ids, weights = store.get(example)
        document = shown.documents[0]
        parts = [part for part in coloured(document) if not part[0].startswith("(x")]
        assert [text for text, _ in parts] == [visible(piece.text) for piece in document.pieces]
        assert ["green" in style for _, style in parts] == [
            bool((weights[piece.begin : piece.end] > 0).any()) for piece in document.pieces
        ]
        out = io.StringIO()
        console = Console(
            file=out, force_terminal=True, color_system="standard", width=100, highlight=False, markup=False
        )
        print_row(console, shown, steps=20, tokens=False)
        body = out.getvalue().split("weights")[1].split("packed in step")[0].partition("\n")[2]
        found = "".join(text for text, is_green in green(body) if is_green)
        assert plain(found) == plain(tokenizer.decode(ids[weights > 0].tolist(), skip_special_tokens=False))


def plain(text: str) -> str:
    """Without the signs that make white space and control characters visible."""
    return re.sub(r"[\s↵·]+", "", text).replace("⟦U+001B⟧", "\x1b")


def test_the_terminal_shows_it_all_without_colour_too(capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
    out = inspect(capsys, prepared, "--row", "chat: rows.jsonl:1", "--tokens")
    assert "\x1b" not in out and "⟦U+001B⟧[31m" in out
    assert "(x0.5)«" in out and out.count("«") == out.count("»") == 1
    assert out.split("«")[1].split("»")[0].endswith("<|im_end|>")
    assert "weights 0.5 x" in out and re.search(
        r"packed in step \d+ of 20, row [12] of 2: slots \d+ to \d+ of 512", out
    )
    assert re.search(r"->\s+\d+\s+\d+ tokens  chat: rows.jsonl:1\n", out)
    store = store_of(prepared)
    example = next(number for number in range(len(store)) if store.row_id(number) == "rows.jsonl:1")
    ids, weights = store.get(example)
    table = out[out.index("  index ") : out.index("packed in step")]
    lines = re.findall(r"^ +(\d+) +(\d+) +(\S+)  (\w+)", table, re.MULTILINE)
    assert [(int(index), int(token), float(weight)) for index, token, weight, _ in lines] == list(
        zip(range(len(ids)), ids.tolist(), weights.tolist(), strict=True)
    )
    assert (
        inspect(capsys, prepared, "--row", str(example)).splitlines()[1:]
        == (inspect(capsys, prepared, "--row", "rows.jsonl:1").splitlines()[1:])
    )


def test_refused_rows_say_why(capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
    for arguments in (["--refused"], ["--refused", "unknown_role"], ["--row", "rows.jsonl:2"]):
        out = inspect(capsys, prepared, *arguments)
        assert "refused rows.jsonl:2: unknown_role: message 0 has role 'robot'" in out and "\x1b" not in out
    assert "unknown_role 1; 1 shown" in inspect(capsys, prepared, "--refused")
    assert "is 'unknown_role' meant?" in fails(capsys, prepared, "--refused", "unknown")


def test_what_is_chosen(capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
    assert inspect(capsys, prepared, "--random", "3").count("document 1 of 1") == 3
    assert inspect(capsys, prepared).count("document 1 of 1") == 1
    assert inspect(capsys, prepared, "--held-out").count("not packed: held out: never trained") == 1
    store = store_of(prepared)
    longest = store.row_id(int(store.lengths.argmax()))
    assert f"chat: {longest} · train" in inspect(capsys, prepared, "--longest", "1")
    assert "an id such as rows.jsonl:40 or rows.jsonl:41" in fails(capsys, prepared, "--row", "rows.jsonl:90")


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, and the text of spans by their class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[str, str]] = []
        self._stack: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._stack.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self._stack[-1] if self._stack else ("", {})
        if tag == "span" and str(attributes.get("title", "")).startswith("token "):
            self.tokens.append((data, str(attributes.get("class", ""))))


def test_the_page_is_one_file_and_nothing_of_a_row_acts(
    capsys: pytest.CaptureFixture[str], prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.html"
    rows = ["--row", "rows.jsonl:1", "--row", "rows.jsonl:2", "--tokens"]
    assert str(out) in inspect(capsys, prepared, *rows, "--html", str(out))
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in text and "@import" not in text and "\x1b" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "unknown_role" in text
    trained = "".join(piece for piece, classes in page.tokens if "t" in classes.split())
    rest = "".join(piece for piece, classes in page.tokens if "t" not in classes.split())
    assert plain(trained) == plain(HOSTILE + "<|im_end|>")
    assert plain(HOSTILE) in plain(rest)
    assert re.search(r'title="token \d+ · id \d+ · weight 0.5 · assistant"', text)
    assert text.count("<i class=own ") == 1 and "the documents of that row" in text


def test_a_page_that_cannot_be_written_is_an_error_of_ours(
    capsys: pytest.CaptureFixture[str], prepared: Path, tmp_path: Path
) -> None:
    assert "writing the page failed" in fails(capsys, prepared, "--html", str(tmp_path / "no" / "such.html"))


def test_data_that_is_not_prepared_says_what_to_run(
    capsys: pytest.CaptureFixture[str], prepared: Path, isolated_store: Path
) -> None:
    error = fails(capsys, prepared, "--set", "data.max_example_tokens=256")
    assert "the data of this run file is not prepared" in error and str(isolated_store) in error
    assert f"python -m steps.prepare_data --config {prepared} --set data.max_example_tokens=256" in error


def test_a_result_is_looked_at_while_nobody_replaces_it(
    capsys: pytest.CaptureFixture[str], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is just being replaced looks like a damaged one, and would be set aside."""
    found: list[str] = []

    def find(store: Store, step: str, key: str) -> StepManifest | None:
        with open(store.root / "locks" / f"{step}-{key}.lock") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(step)
        return real(store, step, key)

    real = Store.find
    monkeypatch.setattr(Store, "find", find)
    inspect(capsys, prepared)
    assert found == ["inputs", "prepare_data"]


def test_of_other_settings_it_says_what_differs(capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
    assert "was made with other config" in fails(capsys, prepared, "--set", "data.deduplicate=true")


def test_of_a_preparation_that_stopped_the_refused_rows_are_shown(
    capsys: pytest.CaptureFixture[str], prepared: Path
) -> None:
    settings = ("--set", "data.max_refused_fraction=0.001")
    with pytest.raises(SystemExit):
        pipeline.main("prepare_data", ["--config", str(prepared), *settings])
    assert "refused rows.jsonl:2: unknown_role" in inspect(capsys, prepared, *settings, "--refused")
    assert "the preparation stopped" in fails(capsys, prepared, *settings, "--random", "1")


def test_the_command_is_part_of_prepare_data_and_needs_no_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', 'inspect', '--help']; "
        "runpy.run_module('steps.prepare_data', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python -m steps.prepare_data inspect --config configs/sft/default.yaml") == 2
