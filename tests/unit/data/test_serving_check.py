"""The comparison of trained ids with served ones: what is taken, what is sent, and how a difference is shown."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.serving_check import (
    Sample,
    Served,
    TrainedTurn,
    chats_of,
    client_request,
    compare,
    differing,
    server_settings,
    take_sample,
    trained_turns,
    variants_of,
)
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Conversation, Message, PlainText, PreferencePair, Prompt

ASKED, ANSWERED = Message("user", "Who has it?"), Message("assistant", "Tom has it.")
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "é"}}}


def config_of(rows: Path, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"name": "a", "path": str(rows)}], **settings})


def served(prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int] = (), **other: Any) -> Served:
    answer = {"refusals": [""] * len(prompts), "renderer": "HfRenderer", "by_template": True, "version": "1"}
    return Served(prompts=prompts, stop_ids=stop_ids, **{**answer, **other})


def as_trained(sample: Sample) -> list[list[int]]:
    """What a server that renders exactly as training does would answer."""
    return [turn.prompt_ids for turn in sample.turns]


def turns_of(tokenizer: ChatTokenizer, row: Any, **settings: Any) -> tuple[list[TrainedTurn], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(trained_turns(tokenizer, row, config_of(Path("x.jsonl"), **settings), counts)), counts


def sample_of(tokenizer: ChatTokenizer, *messages: Message, **settings: Any) -> Sample:
    turns, counts = turns_of(tokenizer, Conversation("a", "rows:1", messages), **settings)
    return Sample(turns, counts)


def test_a_client_sends_arguments_as_text_and_ids_that_its_tool_turns_name() -> None:
    messages = (
        ASKED,
        Message("assistant", None, "I look.", (CALL, {**CALL, "id": "own"})),
        Message("tool", "1", extra={"name": "find"}),
        Message("tool", "2"),
        ANSWERED,
    )
    sent, tools = client_request(Conversation("a", "1", messages, ({"type": "function"},)), 4)
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
    assert sent[1]["content"] is None
    assert sent[1]["reasoning"] == "I look."
    assert [call["function"]["arguments"] for call in sent[1]["tool_calls"]] == ['{"what": "é"}'] * 2
    ids = [call["id"] for call in sent[1]["tool_calls"]]
    assert ids[0] and ids[1] == "own"
    assert [message["tool_call_id"] for message in sent[2:]] == ids
    assert sent[2]["name"] == "find"
    assert tools == [{"type": "function"}]


def test_every_trained_turn_stands_behind_what_was_said_before_it(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED, Message("user", "And now?"), Message("assistant", "Still Tom."))
    assert [turn.message for turn in sample.turns] == [1, 3]
    for turn in sample.turns:
        text = chatml.decode(turn.prompt_ids, skip_special_tokens=False)
        assert text.endswith("assistant\n")
        assert ("Tom has it." in text) == (turn.message == 3)
        assert len(turn.messages) == turn.message
        assert turn.end_id in chatml.special_ids


def test_pairs_are_compared_in_both_answers_and_prompts_whole(chatml: ChatTokenizer) -> None:
    pair = PreferencePair("a", "1", (ASKED,), (ANSWERED,), (Message("assistant", "No one."),))
    turns, _ = turns_of(chatml, pair)
    assert [turn.row_id for turn in turns] == ["1#chosen", "1#rejected"]
    assert turns[0].prompt_ids == turns[1].prompt_ids
    (prompt,), _ = turns_of(chatml, Prompt("a", "2", (ASKED,)))
    assert (prompt.prompt_ids, prompt.message, prompt.end_id) == (turns[0].prompt_ids, 1, None)


def test_rows_without_messages_and_those_that_only_training_reads_so_are_counted(chatml: ChatTokenizer) -> None:
    assert turns_of(chatml, PlainText("a", "1", "words")) == ([], Counter(rows_without_messages=1))
    control = Conversation("a", "1", (Message("user", "say <|im_end|>"), ANSWERED))
    turns, counts = turns_of(chatml, control, control_tokens="as_text")
    assert (turns, counts) == ([], Counter(rows_with_control_tokens_as_text=1))
    with pytest.raises(RefusedRow, match="too_long"):
        turns_of(chatml, Conversation("a", "1", (ASKED, ANSWERED)), max_example_tokens=8, over_length="truncate_right")


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}({{ m.content }}){% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_earlier_turns_trained_as_history_are_not_asked_for(with_template: Callable[..., ChatTokenizer]) -> None:
    tokenizer = with_template(REWRITING)
    messages = (ASKED, ANSWERED, Message("user", "And now?"), Message("assistant", "Still Tom."))
    each = sample_of(tokenizer, *messages)
    assert [(turn.row_id, turn.message) for turn in each.turns] == [("rows:1#turn1", 1), ("rows:1#turn3", 3)]
    history = sample_of(tokenizer, *messages, trained_turns="as_rendered")
    assert [turn.message for turn in history.turns] == [3]
    assert history.counts == Counter(turns_trained_as_history=1)


def test_the_sample_holds_every_shape_of_the_first_rows_and_is_the_same_each_time(
    chatml: ChatTokenizer, tmp_path: Path
) -> None:
    plain = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}
    with_system = {"messages": [{"role": "system", "content": "Be kind."}, *plain["messages"]]}
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(plain)] * 40 + ["{broken", json.dumps(with_system), json.dumps({"messages": []})]
    rows.write_text("\n".join(lines) + "\n")
    sources = [{"name": name, "path": str(rows)} for name in ("a", "b")]
    config = DataConfig.model_validate({"sources": sources})
    sample = take_sample(config, chatml, {"a": str(rows), "b": str(rows)}, 7)
    assert [(turn.source, turn.row_id) for turn in sample.turns] == [
        *(("a", f"rows.jsonl:{line}") for line in (1, 42, 2, 3)),
        *(("b", f"rows.jsonl:{line}") for line in (1, 42, 2)),
    ]
    assert sample.counts == Counter(rows_refused=4)
    assert take_sample(config, chatml, {"a": str(rows), "b": str(rows)}, 7) == sample


def test_equal_ids_make_a_report(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    (end,) = chatml.encode("<|im_end|>").ids.tolist()
    report = compare(sample, variants_of(chatml), served(as_trained(sample), stop_ids=[end]), chatml)
    assert (report.rows, report.turns, report.variants) == ({"a": 1}, {"a": 1}, {"default": 1})
    assert (report.left_out, report.ends_missing) == ({}, {})
    assert "1 trained turns of 1 rows have the ids that HfRenderer" in report.summary()


def test_an_end_that_stops_nothing_is_named(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    report = compare(sample, variants_of(chatml), served(as_trained(sample), stop_ids=[0]), chatml)
    assert report.ends_missing == {"<|im_end|>": 1}


@pytest.mark.parametrize("place", [0, 5, -1])
def test_the_first_differing_token_is_shown_between_its_neighbours(chatml: ChatTokenizer, place: int) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    (ours,) = as_trained(sample)
    place %= len(ours)
    theirs = [*ours[:place], ours[place] + 1, *ours[place + 1 :]]
    with pytest.raises(DataError) as caught:
        compare(sample, variants_of(chatml), served([theirs]), chatml)
    error = caught.value
    assert error.where == f"source a, row rows:1, before message 1: token {place} of the prompt"
    assert f"[{ours[place]} {chatml.pieces([ours[place]])[0]!r}]" in str(error.got)
    assert f"[{theirs[place]} {chatml.pieces([theirs[place]])[0]!r}]" in str(error.expected)
    assert repr(chatml.decode(ours[max(0, place - 6) : place], skip_special_tokens=False)) in str(error.got)
    assert "1 of 1 trained turns, in 1 rows" in error.what


def test_a_prompt_that_only_begins_alike_differs_where_one_ends(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    (ours,) = as_trained(sample)
    for theirs in (ours[:-1], [*ours, 5], []):
        with pytest.raises(DataError, match="the end"):
            compare(sample, variants_of(chatml), served([theirs]), chatml)


def test_a_refusal_of_the_server_is_a_difference(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    with pytest.raises(DataError, match="refuses these messages: no such role"):
        compare(sample, variants_of(chatml), served([[]], refusals=["no such role"]), chatml)


def test_code_of_the_server_is_named(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    answer = served([[5, 6]], renderer="Harmony", by_template=False)
    with pytest.raises(DataError, match="vLLM renders this model by Harmony, not by its chat template"):
        compare(sample, variants_of(chatml), answer, chatml)


def test_a_prompt_that_needs_a_variable_is_counted_by_it(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    variants = {"default": {}, "enable_thinking=False": {"enable_thinking": False}}
    assert [chat["variables"] for chat in chats_of(sample, variants)] == list(variants.values())
    report = compare(sample, variants, served([[1], *as_trained(sample)]), chatml)
    assert report.variants == {"enable_thinking=False": 1}


def test_a_shared_header_needs_only_the_start_and_what_is_sent_beyond_is_named(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    (ours,) = as_trained(sample)
    longer = served([[*ours, 5]])
    assert len(differing(sample, ["default"], longer)) == 1
    sample.turns[0] = dataclasses.replace(sample.turns[0], header_shared=True)
    report = compare(sample, ["default"], longer, chatml)
    more = chatml.decode([5], skip_special_tokens=False)
    first = "source a, row rows:1, before message 1"
    (found,) = report.sent_beyond.values()
    assert list(report.sent_beyond) == [more] and report.left_out == {}
    assert (found["turns"], found["sources"], found["first"]) == (1, {"a": 1}, first)
    assert "'T'] 'om has it." in found["training"] and f"[5 {more!r}]" in found["serving"]
    assert report.never_sent_alone() == ["a"]
    assert f"before 1 of them it also sends {more!r}, which their training does not have (first:" in report.summary()
    both = served([[*ours, 5], ours])  # by a variable it may be asked for without
    assert compare(sample, ["default", "other"], both, chatml).variants == {"other": 1}
    assert compare(sample, ["default", "other"], both, chatml).sent_beyond == {}
    assert len(differing(sample, ["default"], served([ours[:-1]]))) == 1


OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_only_the_turns_whose_header_is_shared_may_end_early(with_template: Callable[..., ChatTokenizer]) -> None:
    """Serving opens a block; the turn that thought has it, the other one was never trained behind it."""
    tokenizer = with_template(OPENS)
    thought = Message("assistant", "Tom.", "Cups are his.")
    sample = sample_of(tokenizer, ASKED, ANSWERED, Message("user", "And now?"), thought)
    assert [(turn.message, turn.header_shared) for turn in sample.turns] == [(1, True), (3, False)]
    rendered = [tokenizer.render(sample_messages, answer_next=True) for sample_messages in (
        (ASKED,), (ASKED, ANSWERED, Message("user", "And now?")),
    )]  # fmt: skip
    prompts = [tokenizer.encode(text).ids.tolist() for text in rendered]
    assert prompts[1] == sample.turns[1].prompt_ids
    report = compare(sample, ["default"], served(prompts), tokenizer)
    assert {text: found["turns"] for text, found in report.sent_beyond.items()} == {"<think>\n": 1}
    assert report.never_sent_alone() == [], "the turn that thought is trained behind it"
    with pytest.raises(DataError, match="1 of 2 trained turns"):
        compare(sample, ["default"], served([prompts[0], [*prompts[1], 5]]), tokenizer)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SHORT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}
LONG = {"messages": [{"role": "user", "content": "Who? " * 200}, {"role": "assistant", "content": "Tom."}]}


def sampled(tokenizer: ChatTokenizer, rows: int, **sources: tuple[str, str]) -> Sample:
    """``sources``: name -> (format, path)."""
    listed = [{"name": name, "format": kind, "path": path} for name, (kind, path) in sources.items()]
    config = DataConfig.model_validate({"sources": listed, "max_example_tokens": 64})
    return take_sample(config, tokenizer, {name: path for name, (_, path) in sources.items()}, rows)


def test_every_source_gives_a_row_however_small_the_sample(chatml: ChatTokenizer, tmp_path: Path) -> None:
    paths = {name: ("messages", write(tmp_path / f"{name}.jsonl", SHORT, SHORT)) for name in "abcd"}
    sample = sampled(chatml, 2, **paths)
    assert [turn.source for turn in sample.turns] == list("abcd") and sample.unchecked == {}


def test_a_source_of_which_nothing_is_compared_is_named(chatml: ChatTokenizer, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", SHORT), write(tmp_path / "bad.jsonl", LONG, LONG, {"messages": []})
    words = write(tmp_path / "words.jsonl", {"text": "words"}, {"text": 5})
    sample = sampled(chatml, 9, a=("messages", good), b=("messages", bad), c=("text", words))
    assert list(sample.unchecked) == ["b"]
    assert "2 rows too long" in sample.unchecked["b"] and "1 rows refused" in sample.unchecked["b"]
    assert "row bad.jsonl:1: too_long" in sample.unchecked["b"]
    report = compare(sample, ["default"], served(as_trained(sample)), chatml)
    assert report.unchecked == sample.unchecked and "source b UNCHECKED: " in report.summary()


def test_nothing_to_compare_is_an_error_save_without_messages(chatml: ChatTokenizer, tmp_path: Path) -> None:
    bad, words = write(tmp_path / "bad.jsonl", LONG, LONG), write(tmp_path / "words.jsonl", {"text": "words"})
    with pytest.raises(DataError, match="nothing is proved") as caught:
        sampled(chatml, 9, b=("messages", bad), c=("text", words))
    assert "source b: 2 rows too long" in str(caught.value.got) and caught.value.where == "data.serving_check"
    assert sampled(chatml, 9, c=("text", words)) == Sample(counts=Counter(rows_without_messages=1))


def settings_of(tokenizer: ChatTokenizer, answer: Served, **data: Any) -> list[str]:
    return server_settings(config_of(Path("x.jsonl"), **data), tokenizer, answer)


def test_what_an_exported_folder_cannot_carry_is_asked_of_the_server(
    chatml: ChatTokenizer, with_template: Callable[..., ChatTokenizer]
) -> None:
    by_template, harmony = served([]), served([], renderer="Harmony", by_template=False)
    assert settings_of(chatml, by_template) == []
    kwargs = {"enable_thinking": False, "mood": "it's"}
    (given,) = settings_of(chatml, by_template, template_kwargs=kwargs)
    flag, value = shlex.split(given)[-2:]
    assert flag == "--default-chat-template-kwargs" and json.loads(value) == kwargs
    dated = with_template("{{ strftime_now('%d %b %Y') }}" + REWRITING)
    (day,) = settings_of(dated, by_template, template_date="2026-03-04")
    assert "the template prints the day: 2026-03-04 in training" in day
    assert settings_of(chatml, harmony, template_kwargs={"reasoning_effort": "low"}, template_date="2026-03-04") == [
        "serve with VLLM_SYSTEM_START_DATE=2026-03-04",
        "ask with reasoning_effort=low",
    ]
    sample = sample_of(chatml, ASKED, ANSWERED)
    report = compare(sample, ["default"], served(as_trained(sample)), chatml, [day])
    assert report.server_settings == [day] and day in report.summary()
