"""What an environment is, how a run file names one, and what it may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import check_options, resolve

if TYPE_CHECKING:
    from posttrain_lib.rl.prompts import RolloutPrompt

#: name -> an environment's class; a run file may name another class, or a function that makes one, as module:attribute
ENVIRONMENTS: dict[str, str] = {"calculator": "posttrain_lib.rl.environments.calculator:Calculator"}


@dataclass(frozen=True)
class Said:
    """A message of the environment. ``role`` is one of :attr:`Environment.roles`."""

    role: str
    content: str


@dataclass(frozen=True)
class Turn:
    """What an environment makes of a turn of the policy.

    ``messages`` go behind it, one or more where the episode goes on. ``done``: the episode is over, and messages are
    not read. ``info`` is for graders: they find that of all turns, later ones over earlier, in
    ``Answer.extra["environment"]``.
    """

    messages: Sequence[Said] = ()
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One episode. It is made anew for each, and its calls run in threads of their own, one at a time."""

    #: who speaks in its messages, as the chat template calls them: tool, user
    roles: frozenset[str]

    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of its tools as an OpenAI request has them, the same in every episode; the prompt shows them."""

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        """The episode begins; what is random in it is drawn from ``seed`` alone."""

    def step(self, text: str) -> Turn:
        """The policy said this: its turn with all markers but the one that ends it."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment and its bounds.

    Args:
        name: a key of ``ENVIRONMENTS``, or ``module:attribute``. options: its keyword arguments.
        max_turns: turns of the policy in an episode. max_tokens: of a whole episode, prompt included.
        deadline_seconds: wall-clock time of one call of it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_turns: int = 8
    max_tokens: int = 4096
    deadline_seconds: float = 10.0


def environment_maker(spec: EnvironmentSpec) -> Callable[[], Environment]:
    """What makes one environment an episode; one was made already, to see that it can be.

    Raises:
        ConfigError: no such environment, options that it does not take, or one without roles. And what it raises.
    """
    where = "grpo.environment"
    named: Any = resolve(spec.name, ENVIRONMENTS, what="environment", where=f"{where}.name")
    check_options(named, spec.options, what="environment", where=f"{where}.options")

    def make() -> Environment:
        made: Environment = named(**spec.options)
        return made

    roles = getattr(make(), "roles", None)
    if not isinstance(roles, frozenset) or not roles or not all(isinstance(role, str) for role in roles):
        raise ConfigError(
            "an environment has to say who speaks in it",
            where=f"{where}.name: {spec.name}",
            got=f"roles = {roles!r}",
            expected='a frozenset of names that the chat template knows, as roles = frozenset({"tool"})',
        )
    return make


def checked(said: object, roles: frozenset[str]) -> Turn:
    """What a step gave.

    Raises:
        ValueError: it is no Turn, goes on without a message, or has one that is no text of one of the roles, or that
            UTF-8 cannot write.
    """
    if not isinstance(said, Turn):
        raise ValueError(f"gave a {type(said).__name__}, not a Turn")
    if not isinstance(said.info, Mapping):
        raise ValueError(f"gave a {type(said.info).__name__} as info, not a mapping")
    if said.done:
        return said
    if not isinstance(said.messages, Sequence):
        raise ValueError(f"gave a {type(said.messages).__name__} as messages, not a sequence")
    for message in said.messages:
        is_text = isinstance(message, Said) and isinstance(message.role, str) and isinstance(message.content, str)
        if not is_text or message.role not in roles:
            raise ValueError(f"gave {str(message)[:100]!r}, not something Said by one of {sorted(roles)}")
        if message.content.encode(errors="replace").decode() != message.content:
            raise ValueError(f"said what is no text: {message.content[:100]!a}")
    if not said.messages:
        raise ValueError("goes on, and says nothing")
    return said
