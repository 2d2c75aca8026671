"""How the prompts of a run are answered, in training as in evaluation: who plays, and what prompts have to show."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain_lib.rl.constrain import make_constrain
from posttrain_lib.rl.environments.base import environment_maker
from posttrain_lib.rl.environments.dialogue import Dialogue
from posttrain_lib.rl.environments.play import PlayEnvironment
from posttrain_lib.rl.environments.tools import with_tools
from posttrain_lib.rl.pump import EnginePump
from posttrain_lib.rl.trajectories import Play, Player, Trajectory

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.rl.constrain import Constrain, ConstraintSpec
    from posttrain_lib.rl.environments.base import EnvironmentSpec
    from posttrain_lib.rl.prompts import RolloutPrompt
    from posttrain_lib.rl.roles import RolloutRole
    from posttrain_lib.schema.rollouts import Sampling


@dataclass(frozen=True)
class Playing:
    """``play`` answers prompts that :meth:`asked` has made ready."""

    tokenizer: ChatTokenizer
    play: Player
    tools: Sequence[Mapping[str, Any]] = ()
    constrain: Constrain | None = None

    def asked(self, prompts: Sequence[RolloutPrompt]) -> list[RolloutPrompt]:
        """The prompts, with the environment's tools shown.

        Raises:
            DataError: as ``environments.tools.with_tools``, or a prompt's row lacks what its constraint is made of.
        """
        if self.constrain is not None:
            for prompt in prompts:
                self.constrain(prompt)
        return with_tools(prompts, self.tokenizer, self.tools)


def make_playing(
    tokenizer: ChatTokenizer,
    environment: EnvironmentSpec | None,
    constraint: ConstraintSpec | None,
    stop_ids: frozenset[int],
    template: str,
) -> Playing:
    """Who plays.

    Args:
        environment: None: an answer is one completion. constraint: None: anything may be sampled.
        stop_ids: tokens that end a turn. template: what the chat template is called in messages.

    Raises:
        ConfigError: the environment or the constraint cannot be made, or the template cannot be used in several turns.
    """
    constrain = None if constraint is None else make_constrain(constraint, tokenizer)
    if environment is None:
        return Playing(tokenizer, Play(tokenizer.decode, constrain), constrain=constrain)
    make = environment_maker(environment)
    first = make()
    tools = tuple(first.tools())
    dialogue = Dialogue(tokenizer, first.roles, tools, stop_ids, template)
    play = PlayEnvironment(make, dialogue, tokenizer.decode, environment, constrain)
    return Playing(tokenizer, play, tools, constrain)


def play_all(
    engine: RolloutRole, play: Player, wanted: Sequence[tuple[RolloutPrompt, Sampling, int]]
) -> list[Trajectory]:
    """A trajectory for each (prompt, sampling, seed), in order, of an engine that does nothing else meanwhile.

    Raises:
        RolloutError: what the engine raises.
    """

    async def everything(pump: EnginePump) -> list[Trajectory]:
        return await asyncio.gather(
            *(
                pump.asking(partial(play, prompt, sampling, seed, str(number)))
                for number, (prompt, sampling, seed) in enumerate(wanted)
            )
        )

    async def with_engine() -> list[Trajectory]:
        pump = EnginePump(engine, in_waves=True)
        working = asyncio.create_task(pump.run())
        playing = asyncio.create_task(everything(pump))
        try:
            await asyncio.wait({working, playing}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            return await playing
        finally:
            for task in (working, playing):
                task.cancel()
            await asyncio.gather(working, playing, return_exceptions=True)
            pump.close()

    return asyncio.run(with_engine())
