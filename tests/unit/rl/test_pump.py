"""The pump: who asks when changes nothing of what a synchronous run computes."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.rl.environments.base import EnvironmentSpec, Said, Turn
from posttrain_lib.rl.playing import make_playing, play_all
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.pump import EnginePump
from posttrain_lib.rl.run import embedded_engine
from posttrain_lib.rl.trajectories import Complete
from posttrain_lib.schema.rollouts import Request, Sampling
from tests.support.dialogues import prompt_of, sampling_of, tokenizer_of, write_talker
from tests.support.table_roles import Table, TableEngine

PLAYERS = 3


class Noting(TableEngine):
    """Keeps the keys of each submission."""

    def __init__(self) -> None:
        super().__init__(Table.random(8), window=32)
        self.submitted: list[list[str]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.submitted.append([request.key for request in requests])
        super().submit(requests)


@pytest.mark.parametrize("order", list(itertools.permutations(range(PLAYERS))), ids=str)
def test_in_waves_turns_go_in_together_in_the_order_of_the_players(order: tuple[int, ...]) -> None:
    """Each thinks behind its first turn until it is called, in this order; one has no third turn."""
    engine = Noting()

    async def play(number: int, called: list[asyncio.Event], complete: Complete) -> None:
        for turn in range(2 if number == 1 else 3):
            if turn == 1:
                await called[number].wait()
            await complete(Request(f"{number}/{turn}", (1,), Sampling(1 + number), number))

    async def everything() -> None:
        pump, called = EnginePump(engine, in_waves=True), [asyncio.Event() for _ in range(PLAYERS)]
        working = asyncio.create_task(pump.run())
        playing = [asyncio.create_task(pump.asking(partial(play, number, called))) for number in range(PLAYERS)]
        for number in order:
            called[number].set()
            await asyncio.sleep(0)  # its request comes before the next one's
        await asyncio.gather(*playing)
        working.cancel()
        pump.close()

    asyncio.run(everything())
    assert engine.submitted == [["0/0", "1/0", "2/0"], ["0/1", "1/1", "2/1"], ["0/2", "2/2"]]


class Queue:
    """Lets threads go on in this order, by the name of their prompt."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order, self.left = order, list(order)
        self.turn = threading.Condition()

    def wait(self, name: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.left[0] == name)
            self.left = self.left[1:] or list(self.order)
            self.turn.notify_all()


class Queued:
    """Says one line, when it is this prompt's turn."""

    roles = frozenset({"user"})
    queue: Queue

    def tools(self) -> Sequence[dict[str, object]]:
        return ()

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        self.name, self.said = int(prompt.row_id), 0

    def step(self, text: str) -> Turn:
        self.said += 1
        if self.said == 3:
            return Turn(done=True)
        self.queue.wait(self.name)
        return Turn([Said("user", "Go on.")])


def logprobs_where(folder: Path, tokenizer: ChatTokenizer, order: Sequence[int]) -> np.ndarray:
    """Of episodes of three turns in float32, whose environments answer in this order."""
    Queued.queue = Queue(order)
    sampling = sampling_of(tokenizer, 12)
    spec = EnvironmentSpec(f"{__name__}:Queued", max_turns=3, max_tokens=300)
    playing = make_playing(tokenizer, spec, None, sampling.stop_ids, "the template")
    wanted = [(prompt_of(tokenizer, "How many apples?", name=str(each)), sampling, each) for each in range(PLAYERS)]
    engine = embedded_engine(str(folder), window=300, decode=tokenizer.decode, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in engine._model.parameters():
        parameter.normal_(0.0, 0.05, generator=generator)
    return np.concatenate([one.logprobs for one in play_all(engine, playing.play, wanted)])


def test_when_environments_answer_changes_no_bit(tmp_path: Path) -> None:
    """Rows of a product differ in their last bits by how many there are: the model has to be wide enough to show it."""
    folder = write_talker(tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32)
    tokenizer = tokenizer_of(folder)
    first, *others = (logprobs_where(folder, tokenizer, order) for order in itertools.permutations(range(PLAYERS)))
    assert all(np.array_equal(first, each) for each in others)
