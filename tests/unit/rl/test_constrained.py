"""Constrained rollouts: the trainer says of a sampled token what the engine said, among the tokens that could come."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.errors import ConfigError, DataError, TrainingError
from posttrain_lib.losses.contract import outcome_of
from posttrain_lib.losses.policy import ADVANTAGES, ROLLOUT, PolicyLoss
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.rl import packing
from posttrain_lib.rl.allowed_sets import allowed_sets
from posttrain_lib.rl.constrain import ConstraintSpec, make_constrain
from posttrain_lib.rl.constraints import State, StateMachine, Trie
from posttrain_lib.rl.environments.base import EnvironmentSpec
from posttrain_lib.rl.packing import pack_samples
from posttrain_lib.rl.playing import make_playing, play_all
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.scoring import Scoring, score_samples
from posttrain_lib.rl.trajectories import Trajectory
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.schema.rollouts import AllowedTokens, TrainSample
from tests.support.dialogues import prompt_of, sampling_of
from tests.support.engines import embedded, loaded
from tests.support.tiny_rollouts import PROBLEMS, train_tiny

CALLS = [
    f'<tool_call>{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}</tool_call>'
    for expression in ("3+4", "6*8", "30-9", "40/5", "1/0")
]
ANSWERS = ["7", "48", "It is 21.", "It is 8.", "I do not know."]
CATALOGUE = ConstraintSpec("trie", {"entries": [*ANSWERS, *CALLS]})
CALCULATOR = EnvironmentSpec("calculator", max_turns=3, max_tokens=600)


def played(
    talker: Path, tokenizer: ChatTokenizer, constraint: ConstraintSpec, environment: EnvironmentSpec | None = None
) -> list[Trajectory]:
    sampling = sampling_of(tokenizer, 120, temperature=0.7)
    playing = make_playing(tokenizer, environment, constraint, sampling.stop_ids, "the template")
    prompts = playing.asked([prompt_of(tokenizer, text) for text, _ in PROBLEMS])
    wanted = [(prompt, sampling, seed) for prompt in prompts for seed in range(3)]
    return play_all(embedded(talker, window=700, slots=16), playing.play, wanted)


def samples_of(trajectories: Sequence[Trajectory]) -> list[TrainSample]:
    return [
        TrainSample(
            one.token_ids,
            one.trained,
            one.prompt_tokens,
            number // 3,
            number,
            {ADVANTAGES: np.cos(1.0 + one.logprobs), ROLLOUT: one.logprobs},
            one.allowed,
        )
        for number, one in enumerate(trajectories)
    ]


class Half:
    """Every second token is free, the others are even ids: no tree, and not the same set everywhere."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.even = np.arange(0, tokenizer.vocabulary_size, 2)

    def __call__(self, prompt: RolloutPrompt) -> AllowedTokens:
        return self

    def after(self, sampled: Sequence[int]) -> np.ndarray | None:
        return self.even if len(sampled) % 2 else None


@pytest.mark.parametrize("constraint", [CATALOGUE, ConstraintSpec(f"{__name__}:Half")], ids=["trie", "half"])
@pytest.mark.parametrize("environment", [None, CALCULATOR], ids=["one turn", "episodes"])
def test_the_trainer_says_what_the_engine_said(
    constraint: ConstraintSpec, environment: EnvironmentSpec | None, talker: Path, tokenizer: ChatTokenizer
) -> None:
    trajectories = played(talker, tokenizer, constraint, environment)
    if constraint is CATALOGUE:
        texts = {turn["content"] for one in trajectories for turn in one.answer.extra.get("turns", ())}
        texts |= {one.answer.text for one in trajectories}
        assert texts & set(ANSWERS) and texts & set(CALLS)
        assert environment is None or {"7", "8", "21", "error: division by zero"} & texts
    model, _ = loaded(talker)
    mesh = rank_mesh(SINGLE, torch.device("cpu"))
    scoring = Scoring(700, 2, temperature=0.7)
    samples = samples_of(trajectories)
    for said, one in zip(score_samples(model, mesh, samples, scoring), trajectories, strict=True):
        # float64 models, in which the engine's cache sums in another order; both numbers are rounded to float32
        np.testing.assert_allclose(said, one.logprobs, rtol=1e-5, atol=1e-6)
    (batch,) = pack_samples(samples, row_tokens=9000).micro_batches
    outcome = outcome_of(PolicyLoss(temperature=0.7), model, [batch])
    total, weight = outcome.figures["mismatch/kl"].tolist()
    assert total / weight < 1e-9, "half the squared difference of two numbers that are rounded to float32"
    (unmasked,) = pack_samples([_free(sample) for sample in samples], row_tokens=9000).micro_batches
    total, weight = outcome_of(PolicyLoss(temperature=0.7), model, [unmasked]).figures["mismatch/kl"].tolist()
    assert total / weight > 0.01, "far more than what a run is allowed"


def _free(sample: TrainSample) -> TrainSample:
    return TrainSample(
        sample.token_ids, sample.trained, sample.prompt_tokens, sample.group, sample.index, sample.signals
    )


def test_a_first_update_is_that_of_later_ones(talker: Path, tokenizer: ChatTokenizer) -> None:
    """Ratios are 1 where old log-probabilities are the trainer's own, as with any samples."""
    model, _ = loaded(talker)
    (batch,) = pack_samples(samples_of(played(talker, tokenizer, CATALOGUE)), row_tokens=9000).micro_batches
    outcome = outcome_of(PolicyLoss(temperature=0.7, entropy_bonus=0.1), model, [batch])
    total, weight = outcome.figures["policy/entropy"].tolist()
    assert outcome.figures["policy/ratio"].tolist() == [weight, weight]
    assert 0 < total / weight < np.log(len([*ANSWERS, *CALLS])), "over what is allowed, not the vocabulary"


def test_how_samples_are_packed_changes_nothing(talker: Path, tokenizer: ChatTokenizer) -> None:
    model, _ = loaded(talker)
    samples = samples_of(played(talker, tokenizer, CATALOGUE, CALCULATOR))
    loss = PolicyLoss(temperature=0.7, entropy_bonus=0.1)
    expected = outcome_of(loss, model, pack_samples(samples, row_tokens=9000).micro_batches)
    for row_tokens, rows, shared in ((700, 1, True), (700, 3, False), (2000, 1, False)):
        batches = pack_samples(
            samples, row_tokens=row_tokens, micro_batch_rows=rows, share_prefixes=shared
        ).micro_batches
        found = outcome_of(loss, model, batches)
        # float64 sums in another order; advantages and weights are float32
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        for name, gradient in expected.gradients.items():
            bound = 1e-6 * float(gradient.abs().max())
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-6, atol=bound)


def test_where_some_prompts_are_free_the_loss_is_the_same_in_every_packing(
    talker: Path, tokenizer: ChatTokenizer
) -> None:
    """A first update: a batch without any set takes the head's other way, whose value is another."""
    model, _ = loaded(talker)
    bound = samples_of(played(talker, tokenizer, CATALOGUE))
    free = [_free(one) if one.group == 0 else one for one in bound]
    expected, found = (
        outcome_of(PolicyLoss(temperature=0.7), model, pack_samples(free, row_tokens=row_tokens).micro_batches)
        for row_tokens in (9000, 100)
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)  # advantages and weights are float32
    for samples, sets in ((free, True), ([*map(_free, bound)], False)):
        batches = pack_samples(samples, row_tokens=100).micro_batches
        assert len(batches) > 1 and all((batch.allowed is not None) is sets for batch in batches)


def test_the_loop_runs_with_the_mask_and_is_stopped_without(
    talker: Path, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calculator that is called; the bound of the mismatch is the run's own."""
    options: dict[str, Any] = {
        "environment": EnvironmentSpec("calculator", max_turns=2, max_tokens=600),
        "constraint": ConstraintSpec("trie", {"entries": [*CALLS, "48"]}),
        "new_tokens": 100,
        "row_tokens": 600,
        "max_mismatch": 1e-3,
    }
    reports = train_tiny(talker, tokenizer, tmp_path / "masked", **options)
    assert [report.step for report in reports] == [0, 1, 2]
    assert all(report.figures["mismatch/kl"] < 1e-6 for report in reports[1:])
    kept = [json.loads(line) for line in (tmp_path / "masked" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in kept} <= {*CALLS, "48"}
    assert max(row["reward"] for row in kept) > 1, "some called the calculator"
    monkeypatch.setattr(packing, "allowed_sets", lambda samples: None)
    with pytest.raises(TrainingError, match="disagree about the sampled tokens"):
        train_tiny(talker, tokenizer, tmp_path / "unmasked", **options)


def sample(tokens: list[int], trained: list[int], allowed: AllowedTokens | None, index: int = 0) -> TrainSample:
    mask = np.isin(np.arange(len(tokens)), trained)
    return TrainSample(np.array(tokens, np.int32), mask, trained[0], 0, index, {}, allowed)


def test_sets_are_those_of_each_completion() -> None:
    """Equal ones once, small ones first; a second completion of an episode begins anew."""
    trie = Trie([[5, 6], [5, 7], [8]], end_id=2)
    sets = allowed_sets([sample([1, 1, 5, 7, 2, 9, 8, 2], [2, 3, 4, 6, 7], trie), sample([1, 3, 4], [1, 2], None, 1)])
    found = [sets.ids[sets.offsets[n] : sets.offsets[n + 1]].tolist() if n >= 0 else None for n in sets.set_of]
    assert found == [[5, 8], [6, 7], [2], [5, 8], [2], None, None]
    assert len(sets.offsets) == 4 and (np.diff(np.diff(sets.offsets)) >= 0).all()
    free = allowed_sets([sample([1, 3], [1], None)])
    assert (free.set_of.tolist(), free.ids.tolist(), free.offsets.tolist()) == ([-1], [], [0])


def test_free_states_have_no_set() -> None:
    machine = StateMachine({"a": State({4: "b"}), "b": State({2: "end"}, otherwise="b"), "end": State()}, "a")
    sets = allowed_sets([sample([1, 4, 9, 9, 2], [1, 2, 3, 4], machine)])
    assert sets.set_of.tolist() == [0, -1, -1, -1] and sets.ids.tolist() == [4]


class Fickle:
    """Says another thing when it is asked again."""

    def after(self, sampled: Sequence[int]) -> np.ndarray:
        return np.array([7, 8])


def test_a_token_that_is_not_allowed_is_named() -> None:
    with pytest.raises(DataError, match="none of those that its constraint allows") as found:
        allowed_sets([sample([1, 7, 5], [1, 2], Fickle(), 3)])
    assert found.value.where is not None and "sample 3 of group 0, trained token 1" in found.value.where


def test_a_row_may_have_its_own_catalogue(tokenizer: ChatTokenizer) -> None:
    constrain = make_constrain(ConstraintSpec("trie", {"field": "choices"}), tokenizer)
    prompt = prompt_of(tokenizer, "Which?")
    chosen = RolloutPrompt(**{**vars(prompt), "extra": {"choices": ["yes", "no"]}})
    first = {tokenizer.encode(text).ids[0] for text in ("yes", "no")}
    trie = constrain(chosen)
    assert trie is not None and trie.after([]).tolist() == sorted(first)  # type: ignore[union-attr]
    assert pickle.loads(pickle.dumps(trie)).after([]).tolist() == sorted(first)
    playing = make_playing(tokenizer, None, ConstraintSpec("trie", {"field": "choices"}), frozenset({2}), "")
    assert playing.asked([chosen]) == [chosen]
    with pytest.raises(DataError, match="asked: 0, field 'choices'"):
        playing.asked([chosen, prompt])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ConstraintSpec("tries"), "did you mean 'trie'"),
        (ConstraintSpec("trie"), "the run's, or each row's"),
        (ConstraintSpec("trie", {"entries": ["a"], "field": "b"}), "the run's, or each row's"),
        (ConstraintSpec("trie", {"words": ["a"]}), "does not take these options"),
        (ConstraintSpec("trie", {"entries": ["a", ""]}), "entry 1"),
        (ConstraintSpec("trie", {"entries": ["maybe", True]}), "True, a bool"),
    ],
)
def test_constraints_that_cannot_be(spec: ConstraintSpec, said: str, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ConfigError, match=said):
        make_constrain(spec, tokenizer)
