"""An episode: the policy and an environment take turns until one of them ends it, or a limit does.

    prompt -> [engine -> what was sampled -> environment -> what follows it]* -> trajectory

What was sampled is kept token for token; what the environment says is added as tokens that are not trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.rl.environments.base import checked
from posttrain_lib.rl.environments.calls import CallFailed, within
from posttrain_lib.rl.trajectories import Complete, Decode, Trajectory, seed_for
from posttrain_lib.schema.rollouts import AllowedTokens, Answer, Completion, Request, Sampling

if TYPE_CHECKING:
    from posttrain_lib.rl.constrain import Constrain
    from posttrain_lib.rl.environments.base import Environment, EnvironmentSpec, Turn
    from posttrain_lib.rl.environments.dialogue import Dialogue
    from posttrain_lib.rl.prompts import RolloutPrompt


class PlayEnvironment:
    """Answers prompts in episodes of an environment; called as ``trajectories.Play``.

    A turn has at most ``sampling.max_new_tokens`` tokens, an episode ``spec.max_turns`` turns and ``spec.max_tokens``
    tokens in all. The answer that graders see is the policy's last turn; the transcript behind the prompt is its
    ``extra["turns"]``, what the environment said of the episode its ``extra["environment"]``, whatever fields of these
    names the row has. An environment that fails ends its episode, and the trajectory says how (``Trajectory.failure``).

    Args:
        make: makes the environment of an episode. dialogue: what stands between turns.
        decode: of the run's tokenizer. constrain: what each turn of a prompt's episode may be; None: anything.
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        dialogue: Dialogue,
        decode: Decode,
        spec: EnvironmentSpec,
        constrain: Constrain | None = None,
    ) -> None:
        self._make, self._dialogue, self._decode, self._spec = make, dialogue, decode, spec
        self._constrain = constrain

    async def __call__(
        self, prompt: RolloutPrompt, sampling: Sampling, seed: int, key: str, complete: Complete
    ) -> Trajectory:
        """The trajectory of one episode."""
        allowed = None if self._constrain is None else self._constrain(prompt)
        episode = _Episode(prompt, self._decode, allowed)
        try:
            environment = await within(self._spec.deadline_seconds, self._make)
            await within(self._spec.deadline_seconds, partial(environment.reset, prompt, seed))
            await self._play(episode, environment, sampling, seed, key, complete)
        except CallFailed as how:
            episode.failure = f"environment: {how}"
        return episode.trajectory()

    async def _play(
        self,
        episode: _Episode,
        environment: Environment,
        sampling: Sampling,
        seed: int,
        key: str,
        complete: Complete,
    ) -> None:
        """Turn after turn; where a limit ends the episode, it is not finished."""
        for number in range(self._spec.max_turns):
            room = self._spec.max_tokens - len(episode.tokens)
            if room < 1:
                return
            way = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
            own_seed = seed if number == 0 else seed_for(seed, episode.prompt.name, 0, number)
            done = await complete(Request(f"{key}/{number}", tuple(episode.tokens), way, own_seed, episode.allowed))
            episode.sampled(done)
            if done.finish == "aborted":
                return
            turn = await self._answered(environment, self._dialogue.words(done.token_ids.tolist()))
            episode.info.update(turn.info)
            if turn.done:
                episode.finished = done.finish == "stop"
                return
            following = self._following(turn, done)
            if len(episode.tokens) + len(following) >= self._spec.max_tokens:
                return
            episode.told(turn, following)

    async def _answered(self, environment: Environment, text: str) -> Turn:
        given: object = await within(self._spec.deadline_seconds, partial(environment.step, text))
        try:
            return checked(given, environment.roles)
        except ValueError as error:
            raise CallFailed(str(error)) from error

    def _following(self, turn: Turn, done: Completion) -> list[int]:
        try:
            return self._dialogue.following(turn.messages, int(done.token_ids[-1]))
        except RefusedRow as refusal:
            raise CallFailed(f"said what cannot be shown: {refusal.detail}") from refusal


class _Episode:
    """What has been said so far."""

    def __init__(self, prompt: RolloutPrompt, decode: Decode, allowed: AllowedTokens | None) -> None:
        self.prompt, self._decode, self.allowed = prompt, decode, allowed
        self.tokens: list[int] = list(prompt.token_ids)
        self.info: dict[str, Any] = {}
        self.finished = False
        self.failure: str | None = None
        self._trained: list[bool] = [False] * len(prompt.token_ids)
        self._done: list[Completion] = []
        self._transcript: list[dict[str, str]] = []

    def sampled(self, done: Completion) -> None:
        """The policy's turn."""
        self._done.append(done)
        self._add(done.token_ids.tolist(), trained=True)
        self._transcript.append({"role": "assistant", "content": self._decode(done.token_ids.tolist()).strip()})

    def told(self, turn: Turn, following: Sequence[int]) -> None:
        """The environment's, as the tokens of everything up to the policy's next turn."""
        self._add(following, trained=False)
        self._transcript += [{"role": message.role, "content": message.content} for message in turn.messages]

    def trajectory(self) -> Trajectory:
        """All of it."""
        prompt, own = self.prompt, [said["content"] for said in self._transcript if said["role"] == "assistant"]
        # An episode may fail before anything is sampled.
        logprobs = [np.zeros(0, np.float32), *(done.logprobs for done in self._done)]
        versions = [np.zeros(0, np.int32), *(done.versions for done in self._done)]
        return Trajectory(
            token_ids=np.array(self.tokens, np.int32),
            prompt_tokens=len(prompt.token_ids),
            trained=np.array(self._trained, bool),
            logprobs=np.concatenate(logprobs).astype(np.float32),
            versions=np.concatenate(versions).astype(np.int32),
            answer=Answer(
                prompt=prompt.messages,
                text=own[-1] if own else "",
                expected=prompt.answer,
                extra={**prompt.extra, "turns": self._transcript, "environment": self.info},
                tokens=sum(self._trained),
                finished=self.finished,
            ),
            finished=self.finished,
            failure=self.failure,
            allowed=self.allowed,
        )

    def _add(self, tokens: Sequence[int], *, trained: bool) -> None:
        self.tokens += tokens
        self._trained += [trained] * len(tokens)
