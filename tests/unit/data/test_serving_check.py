"""The comparison of trained ids with served ones: what is taken, what is sent, and how a difference is shown."""

from __future__ import annotations

import dataclasses
import json
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


def test_a_shared_header_needs_only_the_start_and_is_counted_apart(chatml: ChatTokenizer) -> None:
    sample = sample_of(chatml, ASKED, ANSWERED)
    (ours,) = as_trained(sample)
    longer = served([[*ours, 5]])
    assert len(differing(sample, ["default"], longer)) == 1
    sample.turns[0] = dataclasses.replace(sample.turns[0], header_shared=True)
    report = compare(sample, ["default"], longer, chatml)
    assert report.left_out == {"turns_compared_up_to_a_shared_header": 1}
    assert len(differing(sample, ["default"], served([ours[:-1]]))) == 1
