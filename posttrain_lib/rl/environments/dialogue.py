"""What stands between two turns of the policy, as tokens: the end of its turn, what was said to it, its next header.

    prompt | what the policy sampled | end of turn, messages, header | what the policy sampled | ...
             never tokenised again     from here

Serving renders a conversation as a whole for every turn. What it sends then is what stands here where the template
prints what follows a turn alike whatever stands before, and leaves what stands before as it was. That is tried out on
a few conversations before the first prompt is asked; a template that does otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain_lib.data.control_tokens import spells_control_token
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.turns import common_prefix
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.examples import Message

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.rl.environments.base import Said

_ASKED = (Message("user", "Hello"),)
_MARK = "marked"
#: what a policy may say that templates are known to print otherwise in a history
_ANSWERS = (
    _MARK,
    f"<think>\nreasons\n</think>\n\n{_MARK}",
    f'{_MARK}\n<tool_call>{{"name": "{_MARK}", "arguments": {{"a": 1}}}}</tool_call>',
)
_SHOWN = 60


class Dialogue:
    """What follows a turn of the policy under one chat template.

    Args:
        roles: of the messages that may follow. tools: that the prompts show.
        stop_ids: tokens that end a turn of the policy.
        template: what the template is called in messages.

    Raises:
        ConfigError: the template rewrites history, refuses such a conversation, or ends a turn with no stop token.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        roles: Collection[str],
        tools: Sequence[Mapping[str, Any]],
        stop_ids: frozenset[int],
        template: str,
    ) -> None:
        self._tokenizer, self._tools, self._stop_ids, self._template = tokenizer, tools, stop_ids, template
        for role in sorted(roles):
            self._check(role)

    def following(self, messages: Sequence[Said], last_sampled: int) -> list[int]:
        """Ids of what follows a turn that ended with this token.

        Where that was no stop token (the turn was cut off by its limit, or ended by a stop string), the end of the turn
        is among them: serving would send it, and the policy has not said it. Where it was another stop token than the
        template's own, it stays: what was sampled is what is learned.

        Raises:
            RefusedRow: the template refuses the messages, or they spell a control token.
        """
        for message in messages:
            spells_control_token(self._tokenizer, message.content, "refuse")
        plain = [Message(message.role, message.content) for message in messages]
        ids: list[int] = self._tokenizer.encode(self._behind(_ASKED, _MARK, plain)).ids.tolist()
        return ids[1:] if last_sampled in self._stop_ids else ids

    def words(self, sampled: Sequence[int]) -> str:
        """A turn as an environment reads it: with its markers, but for the one that ends it."""
        ended = len(sampled) > 0 and sampled[-1] in self._stop_ids
        return self._tokenizer.decode(sampled[:-1] if ended else sampled, skip_special_tokens=False)

    def _behind(self, before: Sequence[Message], answer: str, messages: Sequence[Message]) -> str:
        """What the template prints behind an answer.

        Raises:
            RefusedRow: it refuses the conversation. ConfigError: it rewrites what stands before.
        """
        sent = self._tokenizer.render(before, self._tools, answer_next=True) + answer
        said = (*before, Message("assistant", answer), *messages)
        whole = self._tokenizer.render(said, self._tools, answer_next=True)
        if not whole.startswith(sent):
            raise self._rewrites(messages[0].role, sent, whole)
        return whole[len(sent) :]

    def _check(self, role: str) -> None:
        """Raises ConfigError where what follows a turn is not one thing."""
        reply = Message(role, _MARK)
        found: set[str] = set()
        for before, answer in self._probes(role):
            try:
                behind = self._behind(before, answer, [reply])
            except RefusedRow as refusal:
                raise ConfigError(
                    f"the chat template refuses a conversation in which {role} answers the policy",
                    where=self._template,
                    got=refusal.detail,
                    fix="let the environment speak in another role, or name another template (data.chat_template)",
                ) from refusal
            found.add(behind)
            if len(found) > 1:
                raise self._rewrites(role, *sorted(found))
            self._check_tokens(answer, behind)

    def _check_tokens(self, answer: str, behind: str) -> None:
        encode = self._tokenizer.encode
        ids, before, whole = (encode(text).ids.tolist() for text in (behind, answer, answer + behind))
        if not ids or ids[0] not in self._stop_ids or whole != before + ids:
            raise ConfigError(
                "the chat template does not end a turn with a token that ends generation",
                where=self._template,
                got=f"{behind[:_SHOWN]!r} behind a turn, tokens {ids[:4]}",
                expected=f"one of the stop tokens {sorted(self._stop_ids)} first",
                fix="name a template whose turns end with a special token (data.chat_template)",
            )

    def _probes(self, role: str) -> Iterator[tuple[Sequence[Message], str]]:
        """(conversation, the next answer to it): a first turn, and one behind turns of every kind."""
        for answer in _ANSWERS:
            yield _ASKED, answer
            yield (*_ASKED, Message("assistant", answer), Message(role, "more")), _MARK

    def _rewrites(self, role: str, sent: str, printed: str) -> ConfigError:
        same = common_prefix(sent, printed)
        begin = max(0, same - _SHOWN // 3)
        return ConfigError(
            "the chat template rewrites history: what it prints of earlier turns is not what the policy said there",
            where=self._template,
            got=f"{printed[begin : begin + _SHOWN]!r} once {role} has answered",
            expected=f"{sent[begin : begin + _SHOWN]!r}, as it was",
            fix="name a template that prints every turn as it was (data.chat_template; of a model that thinks, one "
            "that keeps earlier reasoning), or an environment that answers in another role",
        )
