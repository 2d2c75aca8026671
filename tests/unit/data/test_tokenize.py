"""Token ids and weights against an oracle that never renders a template: ChatML put together by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.rendering import Document, Span, render_conversation
from posttrain_lib.data.tokenize import tokenize
from posttrain_lib.schema.examples import Conversation, Message

TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30).filter(str.strip)
ANSWER = st.tuples(TEXT, st.sampled_from([None, False, True]), st.sampled_from([None, 0.0, 0.5, 2.0]))
EXCHANGES = st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=5)


def expected(tokenizer: ChatTokenizer, conversation: Conversation) -> tuple[list[int], list[float]]:
    """Encode header, words and marker of each turn apart and put them together."""
    ids: list[int] = []
    weights: list[float] = []
    last = max(i for i, message in enumerate(conversation.messages) if message.loss_weight > 0)
    for index, message in enumerate(conversation.messages[: last + 1]):
        header, said = f"<|im_start|>{message.role}\n", f"{message.content}<|im_end|>"
        trailer = "" if index == last else "\n"
        # A user's header and words are one text to the tokenizer; an answer begins where the prompt was cut.
        pieces = [(header + said + trailer, 0.0)] if message.loss_weight == 0 else [
            (header, 0.0), (said, message.loss_weight), (trailer, 0.0),
        ]  # fmt: skip
        for text, weight in pieces:
            found = tokenizer.encode(text).ids.tolist() if text else []
            ids += found
            weights += [weight] * len(found)
    return ids, weights


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges=EXCHANGES)
def test_ids_and_weights_equal_the_oracles(chatml: ChatTokenizer, exchanges: list[tuple]) -> None:
    messages: list[Message] = []
    for said, (answer, train, weight) in exchanges:
        messages += [Message("user", said), Message("assistant", answer, train=train, weight=weight)]
    conversation = Conversation("s", "1", tuple(messages))
    if not any(message.loss_weight > 0 for message in messages):
        return
    rendered = render_conversation(chatml, conversation, "each")
    tokens = tokenize(chatml, rendered.documents[0])
    ids, weights = expected(chatml, conversation)
    assert tokens.weights[tokens.weights > 0].sum() == np.float32(sum(weights))
    assert chatml.decode(tokens.ids, skip_special_tokens=False) == chatml.decode(ids, skip_special_tokens=False)
    trained = [token for token, weight in zip(ids, weights, strict=True) if weight > 0]
    assert tokens.ids[tokens.weights > 0].tolist() == trained


def test_a_token_across_the_start_of_an_answer_is_split(chatml: ChatTokenizer) -> None:
    text = "It was on Monday."
    whole = chatml.encode(text)
    place = int(whole.ends[1]) - 1
    assert whole.begins[1] < place < whole.ends[1], "the place lies inside a token"
    tokens = tokenize(chatml, Document(text, (Span(place, len(text), 1.0),), ((len(text), "assistant"),), 0))
    assert tokens.resplit
    assert chatml.decode(tokens.ids[tokens.weights > 0]) == text[place:]
    assert tokens.ids[tokens.weights == 0].tolist() == chatml.encode(text[:place]).ids.tolist()


def test_truncation_keeps_what_belongs_together(chatml: ChatTokenizer) -> None:
    text = "It was on Monday."
    tokens = tokenize(chatml, Document(text, (Span(3, len(text), 1.0),), ((6, "user"), (len(text), "assistant")), 0))
    cut = tokens.cut(0, 3)
    assert [len(part) for part in (cut.ids, cut.weights, cut.role_of)] == [3, 3, 3]
    assert sum(cut.by_role.values()) == 3


def test_a_piece_from_the_middle_is_a_document_of_its_own(chatml: ChatTokenizer) -> None:
    text = "It was on Monday."
    spans = (Span(0, 3, 1.0), Span(7, len(text), 0.5))
    tokens = tokenize(chatml, Document(text, spans, ((len(text), "assistant"),), 0))
    whole, (first, end) = len(tokens.ids), tokens.answers[1]
    piece = tokens.cut(first + 1, whole)
    assert piece.ids.tolist() == tokens.ids[first + 1 :].tolist()
    assert piece.answers == ((0, end - first - 1),)
    assert piece.weights[0] == 0.0, "nothing stands before it that could predict it"
    assert piece.weights[1:].tolist() == tokens.weights[first + 2 :].tolist()
    assert tokens.weights[first + 1] == 0.5, "the whole is left as it was"
