"""Train-serve skew: are the ids that a turn is trained behind those that a server puts before it for the same messages?

The training side is made here, from the rows themselves: a sample of every source, of all shapes of conversation that
its first rows have. What a server makes of the same messages comes from an adapter; here the two are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain_lib.data.engine_texts import SAMPLES
from posttrain_lib.data.formats import get_format
from posttrain_lib.data.making import Made, MadeDocument, make
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import trained_messages
from posttrain_lib.data.sources import BadRow, iter_rows
from posttrain_lib.data.turns import Renderings, locate
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import (
    Conversation,
    Message,
    ParsedRow,
    PlainText,
    PreferencePair,
    Prompt,
    TokenRow,
)

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig, Source
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

#: rows of a source looked at for each row that is taken, so that rare shapes of conversation are among those
_LOOKED_AT = 16
#: tokens shown on either side of the first that differs
_CONTEXT = 6


@dataclass(frozen=True)
class TrainedTurn:
    """A trained assistant turn: the ids before it, its end marker, and what a client sends to have it answered.

    ``end_id`` is None where the template prints no marker, or nothing is trained (a prompt for RL).

    ``header_shared``: the generation prompt opens something that this turn does not have (as a think block), so the
    ids are only the start of what a server sends, which the report then names. ``answer_ids``: the first of those
    that the turn is trained to say.
    """

    source: str
    row_id: str
    message: int
    prompt_ids: list[int]
    end_id: int | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    header_shared: bool = False
    answer_ids: list[int] = field(default_factory=list)


@dataclass
class Sample:
    """The turns to compare. ``counts``: rows that training refuses, rows and turns left out, by why.

    ``unchecked`` says of each source that has messages, and no turn here, why.
    """

    turns: list[TrainedTurn] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unchecked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A server's prompts, one list of ids a chat (empty where it refuses it, with the reason), and its stop ids.

    ``by_template`` is False where the server renders by code of its own, which ``renderer`` names.
    """

    prompts: Sequence[Sequence[int]]
    refusals: Sequence[str]
    stop_ids: Sequence[int]
    renderer: str
    by_template: bool
    version: str


@dataclass(frozen=True)
class Report:
    """What was compared, and how it fell out; a difference is no report but an error.

    ``variants`` counts by which template variables a server reaches the trained prompt; ``ends_missing`` counts trained
    last tokens of a turn that do not end a generation, by their text. ``sent_beyond`` has, by text, what a server sends
    behind the ids that a turn is trained behind: the number of ``turns``, the same by ``sources``, and the ``first``
    with its tokens in ``training`` and ``serving``. ``unchecked`` is that of the sample.
    ``server_settings`` are what the server has to be given for these ids beside the exported folder.
    """

    renderer: str
    version: str
    by_template: bool
    rows: dict[str, int]
    turns: dict[str, int]
    variants: dict[str, int]
    left_out: dict[str, int]
    ends_missing: dict[str, int]
    stop_ids: list[int]
    sent_beyond: dict[str, dict[str, Any]]
    unchecked: dict[str, str]
    server_settings: list[str]

    def never_sent_alone(self) -> list[str]:
        """Sources no turn of which is trained behind all that a server sends: what it sends more, training never has.

        Where some turns have it (as those that thought have the think block that the prompt opens), the model knows it.
        """
        beyond = Counter[str]()
        for found in self.sent_beyond.values():
            beyond.update(found["sources"])
        return [source for source, turns in self.turns.items() if beyond[source] == turns]

    def summary(self) -> str:
        """One line for the terminal."""
        variants = ", ".join(f"{count:,} by {name}" for name, count in self.variants.items())
        left = "".join(f"; {count:,} {name.replace('_', ' ')}" for name, count in self.left_out.items())
        left += "".join(
            f"; before {found['turns']:,} of them it also sends {text!r}, which their training does not have (first: "
            f"{found['first']})"
            for text, found in self.sent_beyond.items()
        )
        left += "".join(f"; source {source} UNCHECKED: {why}" for source, why in self.unchecked.items())
        left += "".join(f"; {setting}" for setting in self.server_settings)
        return (
            f"{sum(self.turns.values()):,} trained turns of {sum(self.rows.values()):,} rows have the ids that "
            f"{self.renderer} of vLLM {self.version} sends ({variants or 'none'}){left}"
        )


def take_sample(config: DataConfig, tokenizer: ChatTokenizer, inputs: Mapping[str, str], rows: int) -> Sample:
    """``rows`` rows over all sources and one of each at least, from a source's first rows, all shapes of them in turn.

    Args:
        inputs: source name -> path of its rows.

    Raises:
        DataError: there are rows of messages, and no turn of them can be compared.
    """
    sample = Sample()
    sources = list(config.sources)
    for number, source in enumerate(sources):
        share = max(1, rows // len(sources) + (number < rows % len(sources)))
        taken, counts, first = 0, Counter[str](), ""
        turns_before = len(sample.turns)
        found = itertools.islice(iter_rows(inputs[source.name]), share * _LOOKED_AT)
        for row in _by_shape(found, source, config.held_out.group_field, counts):
            if taken == share:
                break
            try:
                turns = list(trained_turns(tokenizer, row, config, counts))
            except RefusedRow as refusal:
                counts["rows_too_long" if refusal.reason == "too_long" else "rows_refused"] += 1
                first = first or f"; row {row.row_id}: {refusal}"
                continue
            taken += 1
            sample.turns.extend(turns)
        sample.counts.update(counts)
        if len(sample.turns) == turns_before and not counts["rows_without_messages"]:
            sample.unchecked[source.name] = _why_left_out(counts) + first
    if sample.unchecked and not sample.turns:
        raise DataError(
            "no row of the sample can be compared with what serving makes of it, so nothing is proved",
            where="data.serving_check",
            got="; ".join(f"source {source}: {why}" for source, why in sample.unchecked.items()),
            expected="a trained turn of at least one row",
            fix="raise data.serving_samples, so that more rows are looked at, or data.max_example_tokens; mend the "
            "rows where they are at fault; data.serving_check: off trains without this proof",
        )
    return sample


def _why_left_out(counts: Mapping[str, int]) -> str:
    """Of the rows of a source of which no turn was taken."""
    return (
        ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count) or "no trained turn"
    )


def trained_turns(
    tokenizer: ChatTokenizer, row: ParsedRow, config: DataConfig, counts: Counter[str]
) -> Iterator[TrainedTurn]:
    """The trained turns of a row with the ids before each, as preparation makes them; none of a row without messages.

    Raises:
        RefusedRow: preparation refuses the row; so is one here that preparation would cut, since it has to be whole.
    """
    if isinstance(row, PlainText | TokenRow):
        counts["rows_without_messages"] += 1
        return
    made = make(tokenizer, row, config.model_copy(update={"over_length": "refuse"}))
    if made.notes["control_tokens_as_text"]:
        counts["rows_with_control_tokens_as_text"] += 1  # the run file asks for what no server does
        return
    as_rendered = config.trained_turns == "as_rendered" and made.notes["rewritten_conversations"] > 0
    for conversation, document, indices in _asked(row, made, config.train_on):
        # The note is of all turns together; which of them it is of is asked again, by turn.
        renderings = Renderings(tokenizer, conversation) if made.notes["generation_prompt_differs"] else None
        answers = document.tokens.answers or ((len(document.tokens.ids), 0),)  # a prompt has none: all of it is sent
        for index, (first, end) in zip(indices, answers, strict=True):
            if as_rendered and index != indices[-1]:
                counts["turns_trained_as_history"] += 1  # again
                continue
            messages, tools = client_request(conversation, index)
            yield TrainedTurn(
                source=row.source,
                row_id=row.row_id + document.suffix,
                message=index,
                prompt_ids=document.tokens.ids[:first].tolist(),
                end_id=int(document.tokens.ids[end - 1]) if end and document.closed else None,
                messages=messages,
                tools=tools,
                header_shared=renderings is not None and "generation_prompt_differs" in locate(renderings, index).notes,
                answer_ids=document.tokens.ids[first : first + 1 + _CONTEXT].tolist(),
            )


def client_request(conversation: Conversation, before: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools as an OpenAI client sends them to have message ``before`` answered.

    Arguments of calls are JSON text there, reasoning is called ``reasoning``, and every call has an id, which its
    answer names: rows may lack them, servers never do.
    """
    sent: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, message in enumerate(conversation.messages[:before]):
        one: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
        if message.reasoning_content:
            one["reasoning"] = message.reasoning_content
        if message.tool_calls:
            one["tool_calls"] = _client_calls(message, number)
            open_calls = [call["id"] for call in one["tool_calls"]]
        if message.role == "tool":
            named = open_calls.pop(0) if open_calls else f"call_{number}"
            one.setdefault("tool_call_id", named)
        sent.append(one)
    return sent, [dict(tool) for tool in conversation.tools]


def variants_of(tokenizer: ChatTokenizer) -> dict[str, dict[str, Any]]:
    """Name -> template variables by which a client may ask: as the template has it, thinking off, thinking on."""
    variants: dict[str, dict[str, Any]] = {"default": {}}
    if tokenizer.mentions("enable_thinking"):
        variants.update({f"enable_thinking={on}": {"enable_thinking": on} for on in (False, True)})
    return variants


def chats_of(sample: Sample, variants: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chats to have rendered: every turn under every variant, in this order."""
    return [
        {"messages": turn.messages, "tools": turn.tools, "variables": dict(variables)}
        for turn in sample.turns
        for variables in variants.values()
    ]


def compare(
    sample: Sample,
    variants: Iterable[str],
    served: Served,
    tokenizer: ChatTokenizer,
    server_settings: Sequence[str] = (),
) -> Report:
    """Compare ids with ids; ``served`` answers :func:`chats_of`. ``server_settings`` are for the report.

    Raises:
        DataError: a turn is trained behind other ids than a server sends; shows the first differing token.
    """
    names = list(variants)
    matches = [_match(turn, served.prompts, chats) for turn, chats in _chats_by_turn(sample, len(names))]
    if None in matches:
        raise _difference(differing(sample, names, served), len(sample.turns), served, tokenizer)
    turns, by_variant, left_out = Counter[str](), Counter[str](), Counter(sample.counts)
    ends_missing, beyond = Counter[str](), dict[str, dict[str, Any]]()
    for number, (turn, chat) in enumerate(zip(sample.turns, matches, strict=True)):
        assert chat is not None
        turns[turn.source] += 1
        by_variant[names[chat - number * len(names)]] += 1
        if more := list(served.prompts[chat][len(turn.prompt_ids) :]):
            place = f"source {turn.source}, row {turn.row_id}, before message {turn.message}"
            text = tokenizer.decode(more, skip_special_tokens=False)
            first = {"turns": 0, "sources": {}, "first": place, **_both(turn, served.prompts[chat], tokenizer)}
            found = beyond.setdefault(text, first)
            found["turns"] += 1
            found["sources"][turn.source] = found["sources"].get(turn.source, 0) + 1
        if turn.end_id is not None and turn.end_id not in served.stop_ids:
            ends_missing[tokenizer.pieces([turn.end_id])[0]] += 1
    rows = Counter(source for source, _ in {(turn.source, turn.row_id.partition("#")[0]) for turn in sample.turns})
    return Report(
        renderer=served.renderer,
        version=served.version,
        by_template=served.by_template,
        rows=dict(sorted(rows.items())),
        turns=dict(turns),
        variants=dict(by_variant),
        left_out={name: count for name, count in left_out.items() if count},
        ends_missing=dict(ends_missing),
        stop_ids=list(served.stop_ids),
        sent_beyond=beyond,
        unchecked=dict(sample.unchecked),
        server_settings=list(server_settings),
    )


def server_settings(config: DataConfig, tokenizer: ChatTokenizer, served: Served) -> list[str]:
    """What a server has to be started with, or asked with, so that it sends the trained ids.

    The template travels with an exported folder; its variables and the day do not.
    """
    found, variables = [], dict(config.template_kwargs)
    if served.renderer == "Harmony":  # prints the day always
        found.append(f"serve with VLLM_SYSTEM_START_DATE={config.template_date}")
    elif served.by_template and _prints_day(tokenizer):
        found.append(f"the template prints the day: {config.template_date} in training, its own day on a server")
    if not served.by_template and "reasoning_effort" in variables:
        found.append(f"ask with reasoning_effort={variables.pop('reasoning_effort')}")
    if variables:
        given = json.dumps(variables, ensure_ascii=False, sort_keys=True)
        found.insert(0, f"serve with --default-chat-template-kwargs {shlex.quote(given)}")
    return found


def _prints_day(tokenizer: ChatTokenizer) -> bool:
    """Whether the template asks for the day: found out by a mark instead of one, in conversations of several kinds."""
    mark = "\ue000"
    for messages, tools in SAMPLES:
        with contextlib.suppress(RefusedRow):  # a template without tools, or without system turns
            if mark in tokenizer.render(messages, tools, answer_next=True, variables={"strftime_now": lambda _: mark}):
                return True
    return False


def differing(sample: Sample, variants: Iterable[str], served: Served) -> list[tuple[TrainedTurn, Sequence[int], str]]:
    """The turns that no variant of a request reaches: (turn, nearest prompt that a server makes, its refusal or "")."""
    found = []
    for turn, chats in _chats_by_turn(sample, len(list(variants))):
        if _match(turn, served.prompts, chats) is None:
            # Of several variants, the one that stays with the training longest says most.
            nearest = max(chats, key=lambda chat: _agreement(turn.prompt_ids, served.prompts[chat]))
            found.append((turn, served.prompts[nearest], served.refusals[nearest]))
    return found


def _chats_by_turn(sample: Sample, variants: int) -> Iterator[tuple[TrainedTurn, range]]:
    for number, turn in enumerate(sample.turns):
        yield turn, range(number * variants, (number + 1) * variants)


def _match(turn: TrainedTurn, prompts: Sequence[Sequence[int]], chats: range) -> int | None:
    """The first of the chats whose prompt is what the turn is trained behind; else one that begins so, if it may."""
    wanted = turn.prompt_ids
    found = next((chat for chat in chats if list(prompts[chat]) == wanted), None)
    if found is None and turn.header_shared and wanted:
        found = next((chat for chat in chats if list(prompts[chat][: len(wanted)]) == wanted), None)
    return found


def _by_shape(
    rows: Iterable[tuple[str, Any]], source: Source, group_field: str | None, counts: Counter[str]
) -> Iterator[ParsedRow]:
    """The rows that can be read: the first of every shape, then the second of every shape, and so on."""
    parse = get_format(source.format)
    shapes: dict[tuple[bool, ...], list[ParsedRow]] = {}
    for row_id, row in rows:
        try:
            if isinstance(row, BadRow):
                raise RefusedRow(row.reason, row.detail)
            parsed = parse(row, source.name, row_id, group_field, source.fields)
        except RefusedRow:
            counts["rows_refused"] += 1
            continue
        shapes.setdefault(_shape(parsed), []).append(parsed)
    for of_each_shape in itertools.zip_longest(*shapes.values()):
        yield from (parsed for parsed in of_each_shape if parsed is not None)


def _shape(row: ParsedRow) -> tuple[bool, ...]:
    """What templates and servers treat apart."""
    if isinstance(row, PlainText | TokenRow):
        return ()
    messages = (*row.prompt, *row.chosen) if isinstance(row, PreferencePair) else row.messages
    roles = Counter(message.role for message in messages)
    contents = [message.content or "" for message in messages]
    return (
        bool(row.tools),
        any(message.tool_calls for message in messages),
        any(len(message.tool_calls) > 1 for message in messages),
        any(message.reasoning_content for message in messages),
        any(message.content is None for message in messages),
        any(message.extra for message in messages),
        roles["system"] > 0,
        roles["developer"] > 0,
        roles["tool"] > 0,
        roles["user"] > 1,
        all(content.isascii() for content in contents),
        any(content != content.strip() for content in contents),
    )


def _asked(
    row: Conversation | PreferencePair | Prompt, made: Made, train_on: str
) -> Iterator[tuple[Conversation, MadeDocument, list[int]]]:
    """Each document with the conversation it renders, and the indices of the messages that its answers are."""
    if isinstance(row, Conversation):
        for document in made.documents:
            whole = trained_messages(row, train_on)
            yield row, document, whole if len(document.tokens.answers) > 1 else [document.last_turn or 0]
    elif isinstance(row, PreferencePair):
        for document, answer in zip(made.documents, (row.chosen, row.rejected), strict=True):
            start = len(row.prompt)
            conversation = Conversation(row.source, row.row_id, (*row.prompt, *answer), row.tools)
            trained = [start + place for place, message in enumerate(answer) if message.role == "assistant"]
            yield conversation, document, trained
    else:
        conversation = Conversation(row.source, row.row_id, row.messages, row.tools)
        yield conversation, made.documents[0], [len(row.messages)]


def _client_calls(message: Message, number: int) -> list[dict[str, Any]]:
    return [
        {
            "id": call.get("id") or f"call_{number}_{place}",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for place, call in enumerate(message.tool_calls)
    ]


def _agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _difference(
    found: Sequence[tuple[TrainedTurn, Sequence[int], str]], total: int, served: Served, tokenizer: ChatTokenizer
) -> DataError:
    turn, theirs, refusal = found[0]
    place = _agreement(turn.prompt_ids, theirs)
    by = f"vLLM {served.version} ({served.renderer})"
    rows = len({(turn.source, turn.row_id) for turn, _, _ in found})
    own = "" if served.by_template else f"; vLLM renders this model by {served.renderer}, not by its chat template"
    return DataError(
        f"training and serving make different tokens of the same messages: {len(found)} of {total} trained turns, "
        f"in {rows} rows{own}",
        where=f"source {turn.source}, row {turn.row_id}, before message {turn.message}: token {place:,} of the prompt",
        got=f"training  {_shown(turn.prompt_ids, place, tokenizer)}",
        expected=f"{by} refuses these messages: {refusal}" if refusal else f"{by}  {_shown(theirs, place, tokenizer)}",
        fix=_fix(served),
    )


def _both(turn: TrainedTurn, theirs: Sequence[int], tokenizer: ChatTokenizer) -> dict[str, str]:
    """The first token that training has otherwise than serving where a turn begins, each between its neighbours."""
    ours = [*turn.prompt_ids, *turn.answer_ids]
    place = max(len(turn.prompt_ids), _agreement(ours, theirs))
    return {"training": _shown(ours, place, tokenizer), "serving": _shown(theirs, place, tokenizer)}


def _fix(served: Served) -> str:
    if not served.by_template:
        return (
            f"give the rows the form that {served.renderer} prints alike (see the tokens above), or another template "
            "in data.chat_template that matches it; data.serving_check: off trains what this server will not send"
        )
    return (
        "give data.tokenizer, data.chat_template, data.template_date and data.template_kwargs as the server has them "
        "(a tokenizer folder without the model's config.json may load as another class); where the row is at fault, "
        "mend it; data.serving_check: off trains it all the same"
    )


def _shown(ids: Sequence[int], place: int, tokenizer: ChatTokenizer) -> str:
    """The token at ``place`` between its neighbours: ``'before' [id 'text'] 'behind'``."""
    before = tokenizer.decode(ids[max(0, place - _CONTEXT) : place], skip_special_tokens=False)
    behind = tokenizer.decode(ids[place + 1 : place + 1 + _CONTEXT], skip_special_tokens=False)
    at = "the end" if place >= len(ids) else f"{ids[place]} {tokenizer.pieces([ids[place]])[0]!r}"
    return f"{before!r} [{at}] {behind!r}"
