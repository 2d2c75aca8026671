"""What vLLM's own code sends for real conversations, against what training makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import vllm_process, vllm_render
from posttrain_lib.adapters.vllm_render import Answer, Request, render
from posttrain_lib.config.data import DataConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.serving_check import (
    Sample,
    Served,
    TrainedTurn,
    chats_of,
    compare,
    differing,
    take_sample,
    variants_of,
)
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import DataError
from posttrain_lib.models.scratch import write_scratch_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # vLLM alone takes half a minute to start, more beside other work
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]

#: every tokenizer with a template, and the configuration of a model that has it
CONFIG_OF = {
    "gpt-oss": "gpt-oss-20b",
    "mistral-v3": "mistral-7b-v0.3",
    "phi-3-mini": "phi-3-mini-4k",
    "qwen2.5": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
}
ROWS = 300
DATE = "2026-01-01"


@dataclass(frozen=True)
class Asked:
    """A model folder, what training makes of the sample, and what vLLM does."""

    folder: Path
    tokenizer: ChatTokenizer
    sample: Sample
    served: Served

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        return variants_of(self.tokenizer)

    def differing_rows(self) -> set[str]:
        return {turn.row_id.partition("#")[0] for turn, _, _ in differing(self.sample, self.variants, self.served)}

    def answering(self, sample: Sample) -> tuple[Sample, Served]:
        """Those turns of another sample whose messages were asked for, with the answers."""
        chats = [json.dumps(chat) for chat in chats_of(self.sample, self.variants)]
        known = dict(zip(chats, zip(self.served.prompts, self.served.refusals, strict=True), strict=True))
        turns: list[TrainedTurn] = []
        found: list[tuple[Sequence[int], str]] = []
        for turn in sample.turns:
            wanted = [json.dumps(chat) for chat in chats_of(Sample([turn]), self.variants)]
            if all(chat in known for chat in wanted):
                turns.append(turn)
                found.extend(known[chat] for chat in wanted)
        prompts, refusals = zip(*found, strict=True)
        return Sample(turns), dataclasses.replace(self.served, prompts=prompts, refusals=refusals)


def served_by(answer: Answer) -> Served:
    return Served(**dataclasses.asdict(answer))


@pytest.fixture(scope="module")
def sampled(real_data: Path) -> Callable[[ChatTokenizer], Sample]:
    """The rows of both chat files as this tokenizer trains them."""
    paths = {name: str(real_data / "chat" / f"{name}.jsonl") for name in ("chat", "tool_chat")}
    sources = [{"name": name, "path": path} for name, path in paths.items()]
    config = DataConfig.model_validate({"sources": sources, "max_example_tokens": 4096})
    return lambda tokenizer: take_sample(config, tokenizer, paths, ROWS)


@pytest.fixture(scope="module")
def asked(
    real_data: Path, sampled: Callable[[ChatTokenizer], Sample], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Asked]:
    """Name of a tokenizer -> what both sides make of the sample; vLLM is asked once for each."""
    root, made = tmp_path_factory.mktemp("served"), dict[str, Asked]()

    def make(name: str) -> Asked:
        folder = root / name
        shutil.copytree(real_data / "tokenizers" / name, folder)
        shutil.copyfile(real_data / "model_configs" / CONFIG_OF[name] / "config.json", folder / "config.json")
        tokenizer = ChatTokenizer(folder, template_date=DATE)
        sample = sampled(tokenizer)
        answer = render(Request(str(folder), chats_of(sample, variants_of(tokenizer)), {}, DATE))
        return Asked(folder, tokenizer, sample, served_by(answer))

    def get(name: str) -> Asked:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def test_no_tokenizer_with_a_template_is_left_out(real_data: Path) -> None:
    settings = {path.parent.name: json.loads(path.read_text()) for path in real_data.glob("tokenizers/*/*_config.json")}
    assert {name for name, content in settings.items() if content.get("chat_template")} == set(CONFIG_OF)


@pytest.mark.parametrize("name", sorted(set(CONFIG_OF) - {"gpt-oss"}))
def test_training_has_the_ids_that_vllm_sends(name: str, asked: Callable[[str], Asked]) -> None:
    found = asked(name)
    assert found.served.by_template
    assert found.differing_rows() == set()
    report = compare(*_args(found, found.sample))
    assert sum(report.turns.values()) >= ROWS  # phi-3-mini's template has no tools, so it trains few of those rows
    assert report.turns["chat"] >= ROWS / 2
    print(f"{name}: {report.summary()}")


def test_harmony_is_matched_where_the_template_does_and_else_refused_by_name(asked: Callable[[str], Asked]) -> None:
    found = asked("gpt-oss")
    assert (found.served.renderer, found.served.by_template) == ("Harmony", False)
    plain = [turn for turn in found.sample.turns if not turn.tools and turn.messages[0]["role"] == "user"]
    report = compare(*_args(found, Sample(plain)))
    assert report.turns["chat"] >= 100
    with pytest.raises(DataError, match="vLLM renders this model by Harmony, not by its chat template") as caught:
        compare(found.sample, found.variants, found.served, found.tokenizer)
    assert "token" in str(caught.value.where) and "[" in str(caught.value.got)


def test_another_day_is_caught_in_the_prompt(asked: Callable[[str], Asked], sampled: Any) -> None:
    found = asked("gpt-oss")
    sample, served = found.answering(sampled(ChatTokenizer(found.folder, template_date="2026-01-02")))
    assert len(sample.turns) > ROWS
    assert len(differing(sample, found.variants, served)) == len(sample.turns)
    with pytest.raises(DataError) as caught:
        compare(sample, found.variants, served, found.tokenizer)
    assert "'02'" in str(caught.value.got) and "'01'" in str(caught.value.expected)


def test_another_template_is_caught(asked: Callable[[str], Asked], sampled: Any, tmp_path: Path) -> None:
    found = asked("qwen3")
    settings = json.loads((found.folder / "tokenizer_config.json").read_text())
    other = tmp_path / "other.jinja"
    other.write_text(
        settings["chat_template"].replace("'<|im_start|>' + message.role", "'<|im_start|>my ' + message.role")
    )
    sample, served = found.answering(sampled(ChatTokenizer(found.folder, chat_template=other)))
    wrong = differing(sample, found.variants, served)
    assert len(wrong) > ROWS
    with pytest.raises(DataError) as caught:
        compare(sample, found.variants, served, found.tokenizer)
    assert "'<|im_start|>' [" in str(caught.value.got)


def test_a_tokenizer_with_one_merge_less_is_caught(asked: Callable[[str], Asked], sampled: Any, tmp_path: Path) -> None:
    found = asked("qwen3")
    folder = tmp_path / "changed"
    shutil.copytree(found.folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    content["model"]["merges"] = [merge for merge in merges if "".join(merge) != "Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    sample, served = found.answering(sampled(ChatTokenizer(folder)))
    wrong = {turn.row_id for turn, _, _ in differing(sample, found.variants, served)}
    with_the = {turn.row_id for turn in sample.turns if " the " in json.dumps(turn.messages)}
    assert with_the <= wrong and len(wrong) < len({turn.row_id for turn in sample.turns})
    with pytest.raises(DataError, match="' the'"):
        compare(sample, found.variants, served, found.tokenizer)


def test_a_tokenizer_folder_that_loads_as_another_class_is_caught(
    asked: Callable[[str], Asked], sampled: Any, real_data: Path
) -> None:
    """phi-3-mini: without the model's config.json transformers takes LlamaTokenizer, which groups spaces otherwise."""
    found = asked("phi-3-mini")
    sample, served = found.answering(sampled(ChatTokenizer(real_data / "tokenizers" / "phi-3-mini")))
    assert len(differing(sample, found.variants, served)) == len(sample.turns) > ROWS
    with pytest.raises(DataError, match="may load as another class"):
        compare(sample, found.variants, served, found.tokenizer)


def _args(found: Asked, sample: Sample) -> tuple[Sample, dict[str, dict[str, Any]], Served, ChatTokenizer]:
    of_sample, served = found.answering(sample)
    return of_sample, found.variants, served, found.tokenizer


TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}{% if mood is defined %} {{ mood }}{% endif %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.secret }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.what }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of a few thousand parameters with the embedded tokenizer and a template that prints what it is given."""
    root = tmp_path_factory.mktemp("small")
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, root / "tok")
    architecture = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 1024,
    }  # fmt: skip
    write_scratch_model("qwen3", architecture, root / "tok", 0, root / "hf")
    (root / "hf" / "model.safetensors").unlink()  # no weights are read
    (root / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return root / "hf"


def test_a_request_is_what_a_client_sends_and_a_bad_one_spoils_no_other(small: Path) -> None:
    said = [{"role": "user", "content": "Who?"}]
    function = {"name": "find", "parameters": {"type": "object"}, "response": {"type": "null"}}
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"what": "cups"}'}}
    chats: list[dict[str, Any]] = [
        {"messages": said, "tools": [], "variables": {}},
        {"messages": [{"content": "no role"}], "tools": [], "variables": {}},
        {"messages": said, "tools": [{"type": "function", "function": function}], "variables": {}},
        {"messages": [{**said[0], "secret": "hidden"}], "tools": [], "variables": {"mood": "merry"}},
        {"messages": [*said, {"role": "assistant", "content": None, "tool_calls": [call]}, *said], "tools": [],
         "variables": {}},
        {"messages": said * 400, "tools": [], "variables": {}},
    ]  # fmt: skip
    answer = render(Request(str(small), chats, {"mood": "calm"}, "2025-12-24"))
    tokenizer = ChatTokenizer(small)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in answer.prompts]
    assert texts[0] == "24 Dec 2025 calm<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert "response" not in texts[2] and '"description": null' in texts[2]
    assert "merry" in texts[3] and "hidden" not in texts[3]
    assert "assistant\ncups<|im_end|>" in texts[4].replace("None", "")
    assert [bool(text) for text in texts] == [not reason for reason in answer.refusals]
    assert [not reason for reason in answer.refusals] == [True, False, True, True, True, False]
    assert "maximum context length" in answer.refusals[5]
    assert answer.stop_ids == [tokenizer.eos_id]
    assert (answer.renderer, answer.by_template) == ("HfRenderer", True)


def test_a_folder_that_vllm_does_not_take_is_named(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(DataError, match="vLLM renders no chat") as caught:
        render(Request(str(tmp_path / "broken"), [], {}, DATE))
    assert "nothing_known" in str(caught.value.got)
    assert "data.serving_check: off" in str(caught.value.fix)


def test_an_answer_that_takes_too_long_is_an_error(small: Path) -> None:
    with pytest.raises(DataError, match=r"no answer in 0 s"):
        vllm_render.render(Request(str(small), [], {}, DATE), timeout_seconds=0.1)
