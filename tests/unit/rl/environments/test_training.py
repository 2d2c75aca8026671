"""Episodes in training: what the environment said is read and not learned, and the whole loop runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.losses.contract import outcome_of
from posttrain_lib.losses.policy import ADVANTAGES, PolicyLoss
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.environments.base import EnvironmentSpec, Turn
from posttrain_lib.rl.packing import pack_samples
from posttrain_lib.rl.playing import make_playing, play_all
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.trajectories import Trajectory
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.rollouts import Request, TrainSample
from tests.support.dialogues import VOCABULARY, prompt_of, sampling_of
from tests.support.engines import embedded, loaded
from tests.support.tiny_rollouts import PROBLEMS, train_tiny

ASKER = EnvironmentSpec("tests.unit.rl.environments.test_play:Asker", max_turns=3, max_tokens=400)


def episodes(talker: Path, tokenizer: ChatTokenizer) -> list[Trajectory]:
    """Two of three turns each, of one prompt."""
    sampling = sampling_of(tokenizer, 6)
    playing = make_playing(tokenizer, ASKER, None, sampling.stop_ids, "the template")
    wanted = [(prompt_of(tokenizer, PROBLEMS[0][0]), sampling, seed) for seed in (1, 2)]
    return play_all(embedded(talker, window=400), playing.play, wanted)


def packed(trajectories: list[Trajectory]) -> list[PackedBatch]:
    samples = [
        TrainSample(one.token_ids, one.trained, one.prompt_tokens, 0, number, {ADVANTAGES: np.cos(1.0 + one.logprobs)})
        for number, one in enumerate(trajectories)
    ]
    return pack_samples(samples, row_tokens=512).micro_batches


def test_what_the_environment_said_gets_no_gradient(talker: Path, tokenizer: ChatTokenizer) -> None:
    """Other targets where it speaks change nothing; one where the policy spoke does."""
    model, _ = loaded(talker)
    batches = packed(episodes(talker, tokenizer))
    before = outcome_of(PolicyLoss(), model, batches)
    assert sum(len(batch.supervised_index) for batch in batches) == 2 * 3 * 6

    def other_targets(batch: PackedBatch, places: np.ndarray) -> PackedBatch:
        targets = batch.target_ids.copy()
        targets[places] = (targets[places] + 1) % VOCABULARY
        return dataclasses.replace(batch, target_ids=targets)

    untrained = [
        other_targets(batch, np.setdiff1d(np.arange(batch.num_tokens), batch.supervised_index)) for batch in batches
    ]
    after = outcome_of(PolicyLoss(), model, untrained)
    assert all(torch.equal(after.gradients[name], gradient) for name, gradient in before.gradients.items())
    trained = [other_targets(batch, batch.supervised_index[:1]) for batch in batches]
    moved = outcome_of(PolicyLoss(), model, trained)
    assert not all(torch.equal(moved.gradients[name], gradient) for name, gradient in before.gradients.items())


def test_the_trainer_says_of_an_episode_what_the_engine_said(talker: Path, tokenizer: ChatTokenizer) -> None:
    """Token by token, over all turns: both read the same history."""
    model, _ = loaded(talker)
    for one in episodes(talker, tokenizer):
        with torch.no_grad():
            tokens = torch.from_numpy(one.token_ids.astype(np.int64))
            positions, bounds = torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
            logits = model(tokens, positions, bounds, len(tokens), lambda hidden, head: head.logits(hidden))
        said = logits.log_softmax(-1)[np.flatnonzero(one.trained) - 1, one.token_ids[one.trained]]
        # float64 models, in which the engine's cache sums in another order; the engine's numbers are rounded to float32
        np.testing.assert_allclose(said.numpy(), one.logprobs, rtol=1e-5, atol=1e-6)


def test_the_whole_loop_runs(talker: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    reports = train_tiny(talker, tokenizer, tmp_path / "job", environment=ASKER, new_tokens=6, max_mismatch=1e-3)
    assert [report.step for report in reports] == [0, 1, 2] and all(report.loss is not None for report in reports[1:])
    assert 6 < reports[-1].figures["rollout/tokens"] <= 18, "up to three turns of six tokens"
    assert reports[-1].figures["reward/failed"] == 0.0
    kept = [json.loads(line) for line in (tmp_path / "job" / "rollouts.jsonl").read_text().splitlines()]
    assert kept and all(6 < row["tokens"] <= 18 for row in kept)
    assert {tuple(turn["role"] for turn in row["turns"]) for row in kept} == {
        ("assistant", "user") * 2 + ("assistant",)
    }


def test_failures_are_counted_and_the_run_goes_on(talker: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """One prompt's environment fails: its groups are quarantined, with the reason in the ledger."""
    moody = EnvironmentSpec("tests.unit.rl.environments.test_training:Moody", max_tokens=400)
    reports = train_tiny(talker, tokenizer, tmp_path / "job", environment=moody, new_tokens=6)
    assert reports[-1].step == 2 and reports[-1].figures["rollout/quarantined"] == 2.0
    settled = (tmp_path / "job" / "ledger.jsonl").read_text()
    assert "environment: raised ValueError: not this one" in settled
    assert any("gradings failed: " in each.event and "environment: raised ValueError" in each.event for each in reports)


def test_prompts_with_tools_have_the_date_of_those_without(
    talker: Path, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that the data was prepared with; evaluation renders them with it, too."""
    template = tmp_path / "dated.jinja"
    own = (talker / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text("{{- 'day ' ~ strftime_now('%Y-%m-%d') }}" + own, encoding="utf-8")
    asked: list[str] = []
    submit = EmbeddedEngine.submit

    def noted(engine: EmbeddedEngine, requests: Sequence[Request]) -> None:
        asked.extend(tokenizer.decode(each.prompt_ids) for each in requests)
        submit(engine, requests)

    monkeypatch.setattr(EmbeddedEngine, "submit", noted)
    dated = {"chat_template": str(template), "template_date": "2031-05-06"}
    calculator = EnvironmentSpec("calculator", max_tokens=500)
    train_tiny(talker, tokenizer, tmp_path / "job", updates=1, new_tokens=6, environment=calculator, **dated)
    assert asked and all(text.startswith("day 2031-05-06") for text in asked)


class Moody:
    """Raises at the first problem, and ends at the others."""

    roles = frozenset({"user"})

    def tools(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def reset(self, prompt: RolloutPrompt, seed: int) -> None:
        if prompt.row_id == "0":
            raise ValueError("not this one")

    def step(self, text: str) -> Turn:
        return Turn(done=True)
