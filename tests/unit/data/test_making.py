"""What a row becomes: documents, a pair or a prompt; cut, split or refused where it is too long."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats import get_format
from posttrain_lib.data.making import CHOSEN, REJECTED, Made, make
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message, PlainText, PreferencePair, Prompt, TokenRow


def config(**fields: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"name": "s", "path": "x"}], **fields})


def talk(*answers: str) -> Conversation:
    messages = [message for answer in answers for message in (Message("user", "Say it."), Message("assistant", answer))]
    return Conversation("s", "1", tuple(messages))


def learned(tokenizer: ChatTokenizer, made: Made) -> list[str]:
    return [
        tokenizer.decode(document.tokens.ids[document.tokens.weights > 0], skip_special_tokens=False)
        for document in made.documents
    ]


def check_served(tokenizer: ChatTokenizer, row: Conversation, made: Made) -> None:
    """The ids before each trained answer are those of the prompt that serving renders and encodes as one text."""
    served = [
        tokenizer.encode(tokenizer.render(row.messages[:index], answer_next=True)).ids.tolist()
        for index, message in enumerate(row.messages)
        if message.role == "assistant"
    ]
    trained = [found.tokens.ids[:first].tolist() for found in made.documents for first, _ in found.tokens.answers]
    assert trained == served


class TestConversations:
    def test_one_document(self, chatml: ChatTokenizer) -> None:
        made = make(chatml, talk("One.", "Two."), config())
        assert (made.kind, made.left_out, dict(made.notes)) == ("documents", (), {})
        assert learned(chatml, made) == ["One.<|im_end|>Two.<|im_end|>"]
        document = made.documents[0]
        assert (document.suffix, document.last_turn, document.truncated, document.closed) == ("", 3, False, True)

    def test_one_document_a_turn_where_the_template_rewrites(
        self, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        made = make(real_tokenizer("qwen3"), talk("One.", "Two."), config())
        assert [(document.suffix, document.last_turn) for document in made.documents] == [("#turn1", 1), ("#turn3", 3)]
        assert made.notes["rewritten_conversations"] == 1

    @pytest.mark.parametrize("answers", [("\nHello", "bye"), ("\n\nHello", "\nbye"), ("Hello", "bye")])
    def test_every_turn_has_the_ids_that_serving_sends_before_it(
        self, answers: tuple[str, ...], real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        """Qwen2.5 has a token for two newlines: the header's and the answer's, once the answer is history."""
        tokenizer, row = real_tokenizer("qwen2.5"), talk(*answers)
        made = make(tokenizer, row, config())
        split = answers[0].startswith("\n")
        assert made.notes["resplit_conversations"] == split
        assert [(found.suffix, found.last_turn) for found in made.documents] == (
            [("#turn1", 1), ("#turn3", 3)] if split else [("", 3)]
        )
        check_served(tokenizer, row, made)
        assert "".join(learned(tokenizer, made)) == "".join(f"{answer}<|im_end|>" for answer in answers)

    def test_a_turn_each_where_the_header_ends_inside_a_token(
        self, with_template: Callable[..., ChatTokenizer]
    ) -> None:
        tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ 'It was on Mo' if m.role == 'assistant' }}{{ m.content }}<|im_end|>"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>It was on Mo{% endif %}"
        )
        row = talk("nday.", "nday.")
        made = make(tokenizer, row, config())
        assert [found.suffix for found in made.documents] == ["#turn1", "#turn3"]
        assert made.notes == {"resplit_conversations": 1}
        assert all(found.tokens.resplit for found in made.documents)
        check_served(tokenizer, row, made)
        assert [found.tokens.roles[found.tokens.role_of[-1]] for found in made.documents] == ["assistant"] * 2
        pair = PreferencePair("s", "1", row.messages[:1], row.messages[1:], (Message("assistant", "Go."),))
        with pytest.raises(RefusedRow, match="answer_rewritten"):
            make(tokenizer, pair, config())

    def test_the_settings_reach_the_rendering(self, chatml: ChatTokenizer) -> None:
        assert learned(chatml, make(chatml, talk("One.", "Two."), config(train_on="last"))) == ["Two.<|im_end|>"]
        spelt = talk("It is <|im_end|>.")
        with pytest.raises(RefusedRow, match="control_token_in_text"):
            make(chatml, spelt, config())
        made = make(chatml, spelt, config(control_tokens="as_text"))
        assert learned(chatml, made) == ["It is <|im_end|>.<|im_end|>"]
        assert made.notes == {"control_tokens_as_text": 1}

    def test_what_is_too_long_is_left_out_beside_what_is_not(
        self, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        tokenizer = real_tokenizer("qwen3")
        first = len(make(tokenizer, talk("One."), config()).documents[0].tokens.ids)
        made = make(tokenizer, talk("One.", "Two."), config(max_example_tokens=first))
        assert [document.suffix for document in made.documents] == ["#turn1"]
        assert [(suffix, problem.reason) for suffix, problem in made.left_out] == [("#turn3", "too_long")]


class TestOverLength:
    LONG = talk("one two three four five six seven eight nine ten. " * 4)

    def whole(self, tokenizer: ChatTokenizer) -> np.ndarray:
        return make(tokenizer, self.LONG, config()).documents[0].tokens.ids

    def test_refused(self, chatml: ChatTokenizer) -> None:
        with pytest.raises(RefusedRow, match=r"too_long: \d+ tokens, data.max_example_tokens is 40"):
            make(chatml, self.LONG, config(max_example_tokens=40))

    def test_the_end_is_cut_off(self, chatml: ChatTokenizer) -> None:
        made = make(chatml, self.LONG, config(max_example_tokens=40, over_length="truncate_right"))
        document, whole = made.documents[0], self.whole(chatml)
        assert document.truncated
        assert document.tokens.ids.tolist() == whole[:40].tolist()
        assert document.tokens.answers[0][1] == 40
        assert made.notes == {"truncated_tokens": len(whole) - 40}

    def test_the_start_is_cut_off(self, chatml: ChatTokenizer) -> None:
        made = make(chatml, self.LONG, config(max_example_tokens=40, over_length="truncate_left"))
        document, whole = made.documents[0], self.whole(chatml)
        assert document.tokens.ids.tolist() == whole[-40:].tolist()
        assert document.tokens.answers[0][0] == 0
        assert document.tokens.weights[0] == 0.0
        assert document.tokens.weights[1:39].all()
        assert made.notes == {"truncated_tokens": len(whole) - 40}

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(limit=st.integers(8, 200))
    def test_split_pieces_add_up_to_the_whole(self, chatml: ChatTokenizer, limit: int) -> None:
        made = make(chatml, self.LONG, config(max_example_tokens=limit, over_length="split"))
        whole = self.whole(chatml)
        if limit >= len(whole):
            assert [document.suffix for document in made.documents] == [""]
            return
        suffixes = [document.suffix for document in made.documents] + [suffix for suffix, _ in made.left_out]
        assert sorted(suffixes) == sorted(f"#part{number}" for number in range(-(-len(whole) // limit)))
        for document in made.documents:
            number = int(document.suffix.removeprefix("#part"))
            assert document.truncated
            assert document.tokens.ids.tolist() == whole[number * limit : (number + 1) * limit].tolist()
        assert {problem.reason for _, problem in made.left_out} <= {"nothing_left"}
        assert made.notes["split_parts"] == len(made.documents)

    def test_a_piece_without_a_trained_token_is_left_out(self, chatml: ChatTokenizer) -> None:
        asked = Message("user", "one two three four five six seven eight nine ten. " * 4)
        row = Conversation("s", "1", (asked, Message("assistant", "Yes.")))
        made = make(chatml, row, config(max_example_tokens=40, over_length="split"))
        assert made.left_out[0][0] == "#part0"
        assert made.left_out[0][1].reason == "nothing_left"
        with pytest.raises(RefusedRow, match="nothing_left"):
            make(chatml, row, config(max_example_tokens=40, over_length="truncate_right"))


PAIR = PreferencePair(
    "s", "1", (Message("user", "Hello."),), (Message("assistant", "Good day to you."),), (Message("assistant", "Go."),)
)


class TestPairs:
    def test_two_documents_with_one_prompt(self, chatml: ChatTokenizer) -> None:
        made = make(chatml, PAIR, config())
        assert (made.kind, [document.suffix for document in made.documents]) == ("pair", [CHOSEN, REJECTED])
        assert learned(chatml, made) == ["Good day to you.<|im_end|>", "Go.<|im_end|>"]
        chosen, rejected = (document.tokens for document in made.documents)
        first = chosen.answers[0][0]
        assert chosen.ids[:first].tolist() == rejected.ids[:first].tolist()
        assert rejected.answers[0][0] == first

    def test_earlier_answers_are_not_trained(self, chatml: ChatTokenizer) -> None:
        earlier = (Message("user", "a"), Message("assistant", "b", weight=2.0), Message("user", "c"))
        made = make(chatml, dataclasses.replace(PAIR, prompt=earlier), config())
        assert learned(chatml, made) == ["Good day to you.<|im_end|>", "Go.<|im_end|>"]
        assert all(set(document.tokens.weights.tolist()) == {0.0, 1.0} for document in made.documents)

    def test_prompts_that_the_template_prints_differently(self, real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
        """Qwen3 closes thinking before an answer without reasoning, and not before one with it."""
        reasoned = dataclasses.replace(PAIR, chosen=(Message("assistant", "Good day.", "They greet me."),))
        with pytest.raises(RefusedRow, match="prompts_differ"):
            make(real_tokenizer("qwen3"), reasoned, config())

    @pytest.mark.parametrize("policy", ["refuse", "split"])
    def test_a_pair_is_never_cut_in_two(self, policy: str, chatml: ChatTokenizer) -> None:
        length = sum(len(document.tokens.ids) for document in make(chatml, PAIR, config()).documents)
        assert make(chatml, PAIR, config(max_example_tokens=length, over_length=policy)).kind == "pair"
        with pytest.raises(RefusedRow, match="too_long"):
            make(chatml, PAIR, config(max_example_tokens=length - 1, over_length=policy))

    @pytest.mark.parametrize("policy", ["truncate_right", "truncate_left"])
    def test_answers_are_cut_to_one_length(self, policy: str, chatml: ChatTokenizer) -> None:
        whole = [document.tokens for document in make(chatml, PAIR, config()).documents]
        first = whole[0].answers[0][0]
        answers = [len(tokens.ids) - first for tokens in whole]
        reasons = set()
        for limit in range(2 * first + 2, 2 * first + sum(answers)):
            try:
                made = make(chatml, PAIR, config(max_example_tokens=limit, over_length=policy))
            except RefusedRow as refusal:
                reasons.add(refusal.reason)
                continue
            cut = [document.tokens for document in made.documents]
            assert [tokens.ids[:first].tolist() for tokens in cut] == [whole[0].ids[:first].tolist()] * 2
            kept = [len(tokens.ids) - first for tokens in cut]
            assert limit - 1 <= 2 * first + sum(kept) <= limit
            assert kept[0] == kept[1] or min(kept) == min(answers)
            assert made.notes["truncated_tokens"] == sum(answers) - sum(kept)
            assert [document.truncated for document in made.documents] == [
                now < before for now, before in zip(kept, answers, strict=True)
            ]
        assert reasons <= {"answers_equal"}, "both begin with a G"
        with pytest.raises(RefusedRow, match="nothing_left"):
            make(chatml, PAIR, config(max_example_tokens=2 * first + 1, over_length=policy))


class TestPromptsTextAndTokens:
    def test_a_prompt_trains_nothing_and_is_what_serving_sends(self, chatml: ChatTokenizer) -> None:
        made = make(chatml, Prompt("s", "1", (Message("user", "Two and two?"),), "4"), config())
        tokens = made.documents[0].tokens
        assert (made.kind, tokens.weights.any(), tokens.answers) == ("prompt", np.False_, ())
        spelt = chatml.decode(tokens.ids, skip_special_tokens=False)
        assert spelt == "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
        for policy in ("refuse", "truncate_left", "truncate_right", "split"):
            with pytest.raises(RefusedRow, match="too_long"):
                make(
                    chatml,
                    Prompt("s", "1", (Message("user", "Two and two?" * 9),)),
                    config(max_example_tokens=20, over_length=policy),
                )

    @pytest.mark.parametrize(("name", "begins"), [("mistral-v3", True), ("qwen3", False), ("gpt-oss", False)])
    def test_plain_text_as_the_tokenizer_would_begin_it(
        self, name: str, begins: bool, real_tokenizer: Callable[[str], ChatTokenizer]
    ) -> None:
        tokenizer = real_tokenizer(name)
        tokens = make(tokenizer, PlainText("s", "1", "Once upon a time"), config()).documents[0].tokens
        bos = [tokenizer.bos_id] if begins else []
        assert tokens.ids.tolist() == [*bos, *tokenizer.encode("Once upon a time").ids.tolist(), tokenizer.eos_id]
        assert tokens.weights.tolist() == [0.0] + [1.0] * (len(tokens.ids) - 1)

    def test_plain_text_that_spells_a_control_token(self, chatml: ChatTokenizer) -> None:
        row = PlainText("s", "1", "a <|im_end|> b")
        with pytest.raises(RefusedRow, match="control_token_in_text"):
            make(chatml, row, config())
        made = make(chatml, row, config(control_tokens="as_text"))
        ids = made.documents[0].tokens.ids
        assert chatml.decode(ids[:-1], skip_special_tokens=False) == row.text
        assert ids[-1] == chatml.eos_id
        assert not chatml.special_ids.intersection(ids[:-1].tolist())
        assert made.notes["control_tokens_as_text"] == 1

    def test_tokens_are_taken_as_they_are(self, chatml: ChatTokenizer) -> None:
        weights = np.array([0, 1, 0.5, 0, 2], np.float32)
        row = TokenRow("s", "1", np.array([5, 6, 7, 8, 9], np.int32), weights)
        made = make(chatml, row, config())
        tokens = made.documents[0].tokens
        assert tokens.ids.tolist() == [5, 6, 7, 8, 9]
        assert tokens.weights.tolist() == weights.tolist()
        assert tokens.answers == ((1, 3), (4, 5))
        with pytest.raises(RefusedRow, match="token_out_of_range"):
            make(chatml, dataclasses.replace(row, token_ids=np.array([5, 6, 7, 8, 10**6], np.int32)), config())
        with pytest.raises(RefusedRow, match="nothing_to_train"):
            make(chatml, dataclasses.replace(row, loss_weights=np.zeros(5, np.float32)), config())


REAL = [
    ("gsm8k/train.jsonl", "prompt_completion", {"prompt": "question", "completion": "answer"}, "documents"),
    ("gsm8k/train.jsonl", "prompts", {"prompt": "question"}, "prompt"),
    ("preference/pairs.jsonl", "preference", {}, "pair"),
    ("chat/chat.jsonl", "messages", {}, "documents"),
    ("chat/tool_chat.jsonl", "messages", {}, "documents"),
]


def rows_of(path: Path, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in range(0, len(lines), len(lines) // number):
        yield f"{path.name}:{line}", json.loads(lines[line])


@pytest.mark.parametrize(("file", "name", "fields", "kind"), REAL)
def test_real_rows(
    file: str, name: str, fields: dict[str, str], kind: str, real_data: Path,
    real_tokenizer: Callable[[str], ChatTokenizer],
) -> None:  # fmt: skip
    tokenizer, parse, found = real_tokenizer("qwen3"), get_format(name), []
    for row_id, row in rows_of(real_data / file, 30):
        made = make(tokenizer, parse(row, "s", row_id, "group", fields), config(max_example_tokens=16384))
        assert made.left_out == ()
        found.append(made.kind)
        for document in made.documents:
            assert bool(np.count_nonzero(document.tokens.weights)) == (kind != "prompt")
    assert set(found) == {kind}


words = st.integers(1, 60).map(lambda number: "word " * number)
policies = st.sampled_from(["refuse", "truncate_right", "truncate_left", "split"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(words, min_size=2, max_size=6), limit=st.integers(8, 120), policy=policies, kind=st.integers(0, 3))
def test_tokens_read_are_kept_cut_or_left_out(
    real_tokenizer: Callable[[str], ChatTokenizer], said: list[str], limit: int, policy: str, kind: int
) -> None:
    """Qwen3's template makes a document of every turn, so some are left out beside others."""
    tokenizer = real_tokenizer("qwen3")
    asked = (Message("user", said[0]),)
    turns = [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(said)]
    row = [
        Conversation("s", "1", tuple(turns[: len(turns) // 2 * 2])),
        PreferencePair("s", "1", asked, (Message("assistant", said[1]),), (Message("assistant", said[1] + "no"),)),
        PlainText("s", "1", "".join(said)),
        Prompt("s", "1", asked),
    ][kind]
    free = make(tokenizer, row, config(max_example_tokens=10**6))
    read = sum(len(document.tokens.ids) for document in free.documents)
    assert (free.read_tokens, free.left_out_tokens, free.notes["truncated_tokens"]) == (read, 0, 0)
    try:
        made = make(tokenizer, row, config(max_example_tokens=limit, over_length=policy))
    except RefusedRow as refusal:
        accounts = (refusal.tokens, refusal.tokens)
    else:
        kept = sum(len(document.tokens.ids) for document in made.documents)
        accounts = (made.read_tokens, kept + made.notes["truncated_tokens"] + made.left_out_tokens)
    assert accounts == (read, read)
