"""What recipe grpo adds to training and evaluation: prompts, graders, the engine, as a job is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.grpo import GRPO
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, StepContext, known_digests
from steps.places import local_folder

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.rl.constrain import ConstraintSpec
    from posttrain_lib.rl.environments.base import EnvironmentSpec
    from posttrain_lib.rl.job import RolloutJob
    from posttrain_lib.rl.playing import Playing
    from posttrain_lib.rl.rewards.base import RewardSpec
    from posttrain_lib.rl.settings import RLSettings
    from posttrain_lib.schema.rollouts import Sampling

#: how the run is watched, and how much of it: no weight depends on these, nor which checkpoint is called the best
_HABITS: Any = {
    **dict.fromkeys(("shown_answers", "grader_processes", "warm_start", "reference", "placement"), True),
    "held_out": {"samples", "every_steps"},
}


def settings(config: RunConfig) -> dict[str, Any]:
    """What of the section decides the weights and the best of them, the warm start aside: that comes in as the model.
    Prompts come in as they were rendered; what an environment adds to them, its tools and turns, is rendered by
    training itself."""
    assert config.grpo is not None
    found = config.grpo.model_dump(mode="json", exclude={**_HABITS, "teacher": {"path", "origin"}})
    if config.grpo.environment is not None:
        found["template"] = config.data.template_variables
    return found


def habits(config: RunConfig) -> dict[str, Any]:
    """The rest of what decides the step's files."""
    assert config.grpo is not None
    return config.grpo.model_dump(mode="json", include={"held_out", "shown_answers"})


def start_model(config: RunConfig, manifests: Manifests) -> ArtifactRef:
    """The model that training starts from: after the warm start, where the recipe has one."""
    warm = config.grpo is not None and config.grpo.warm_start is not None
    return manifests["warm_start" if warm else "convert_model"].outputs["model"]


def specs(grpo: GRPO) -> tuple[RewardSpec, ...]:
    """The graders."""
    from posttrain_lib.rl.rewards.base import RewardSpec

    return tuple(
        RewardSpec(term.name, term.shown_as, term.weight, term.options, term.deadline_seconds) for term in grpo.rewards
    )


def judges(config: RunConfig) -> dict[str, ArtifactRef]:
    """The files and folders that graders read, reward models above all, by their content.

    Raises:
        ConfigError: there is no such path, or no such grader.
    """
    from posttrain_lib.rl.rewards.base import named_grader

    found = {}
    for spec in () if config.grpo is None else specs(config.grpo):
        for option in getattr(named_grader(spec), "reads", ()):
            path = spec.options.get(option)
            if path is not None and (local := local_folder(path, f"grpo.rewards: {spec.title}")) is not None:
                digest = known_digests().path(local)
                found[f"grader:{spec.title}:{option}"] = ArtifactRef(path, "grader", digest)
    return found


def check_answers(config: RunConfig, manifests: Manifests) -> None:
    """That a reward which compares with the rows' answers has any, before a step is paid for.

    Raises:
        DataError: no prompt has one. Where only some have none, their gradings fail and are counted.
    """
    from posttrain_lib.rl.prompts import iter_prompts
    from posttrain_lib.rl.rewards.base import check_grader

    if config.grpo is None:
        return
    needing = [spec.title for spec in specs(config.grpo) if getattr(check_grader(spec), "needs_answer", None) is True]
    if not needing:
        return
    names = []
    for prompt in iter_prompts(Path(manifests["prepare_data"].outputs["train_prompts"].uri)):
        if prompt.answer is not None:
            return
        names.append(prompt.name)
    if names:  # a run without prompts says so itself
        raise DataError(
            "no prompt has an answer that the reward could compare with",
            where=f"rewards: {', '.join(needing)}",
            got=f"{len(names):,} prompts without one, the first is {names[0]}",
            expected="a text or a number in the field 'answer' of rows",
            fix="say which field has it (data.sources.fields: {answer: NAME}), or name another reward",
        )


def sampling(grpo: GRPO, tokenizer: ChatTokenizer) -> Sampling:
    """How training's answers are drawn.

    Raises:
        ConfigError: a stop string that no answer's text has.
    """
    from posttrain_lib.data.probes import stop_ids
    from posttrain_lib.schema.rollouts import Sampling

    rollout = grpo.rollout
    for text in rollout.stop_strings:
        ids = tokenizer.encode(text).ids.tolist()
        if not ids or tokenizer.decode(ids) != tokenizer.decode(ids, skip_special_tokens=False):
            raise ConfigError(
                "no answer would end behind a stop string: it is looked for in text, which has no control tokens",
                where="grpo.rollout.stop_strings",
                got=repr(text),
                expected="words that an answer may have; what ends a turn ends it anyway",
            )
    return Sampling(
        rollout.max_new_tokens, rollout.temperature, frozenset(stop_ids(tokenizer)), tuple(rollout.stop_strings)
    )


def rl_settings(config: RunConfig, tokenizer: ChatTokenizer) -> RLSettings:
    """What the controller is told."""
    from posttrain_lib.rl.settings import HeldOut, RLSettings

    grpo, train = config.grpo, config.train
    assert grpo is not None and train.steps is not None
    return RLSettings(
        updates=train.steps,
        prompts_per_batch=grpo.prompts_per_step,
        group_size=grpo.group_size,
        sampling=sampling(grpo, tokenizer),
        updates_per_batch=grpo.updates_per_batch,
        max_staleness=grpo.max_staleness,
        placement=grpo.placed,
        advantage=grpo.advantage,
        normalise=grpo.normalise,
        clip_reward=grpo.clip_reward,
        teacher_weight=0.0 if grpo.teacher is None else grpo.teacher.weight,
        skip_solved=grpo.skip_solved,
        skip_hopeless=grpo.skip_hopeless,
        drop_no_signal=grpo.drop_no_signal,
        max_refills=grpo.max_refills,
        mask_unfinished=grpo.mask_unfinished,
        needs_old=grpo.needs_old,
        save_every=train.checkpoint.every_steps,
        shown=grpo.shown_answers,
        seed=train.seed,
        held_out=HeldOut(grpo.held_out.prompts, grpo.held_out.samples, grpo.held_out.every_steps),
    )


def environment(config: RunConfig) -> EnvironmentSpec | None:
    """What answers the policy; None: nothing."""
    from posttrain_lib.rl.environments.base import EnvironmentSpec

    if config.grpo is None or config.grpo.environment is None:
        return None
    found = config.grpo.environment
    tokens = found.max_tokens or config.train.row_tokens
    return EnvironmentSpec(found.name, found.options, found.max_turns, tokens, found.deadline_seconds)


def constraint(config: RunConfig) -> ConstraintSpec | None:
    """What may be sampled; None: anything."""
    from posttrain_lib.rl.constrain import ConstraintSpec

    if config.grpo is None or config.grpo.constraint is None:
        return None
    return ConstraintSpec(config.grpo.constraint.name, config.grpo.constraint.options)


def playing(context: StepContext, tokenizer: ChatTokenizer) -> Playing:
    """How prompts are answered."""
    from posttrain_lib.rl.playing import make_playing

    config, inputs = context.config, context.inputs
    assert config.grpo is not None
    template = inputs["chat_template" if "chat_template" in inputs else "tokenizer"].uri
    return make_playing(
        tokenizer, environment(config), constraint(config), sampling(config.grpo, tokenizer).stop_ids, template
    )


def longest_prompt(config: RunConfig) -> int:
    """Tokens of the longest prompt that leaves room for an answer, or an environment's first turn."""
    assert config.grpo is not None
    found = environment(config)
    room = config.train.row_tokens if found is None else found.max_tokens
    return room - config.grpo.rollout.max_new_tokens


def job(context: StepContext, tokenizer: ChatTokenizer) -> RolloutJob | None:
    """The job's rollouts; None for other recipes."""
    from posttrain_lib.rl.job import RolloutJob

    config, grpo, inputs = context.config, context.config.grpo, context.inputs
    if grpo is None:
        return None
    rollout = grpo.rollout
    return RolloutJob(
        prompts=inputs["train_prompts"].uri,
        held_out=inputs["prompts"].uri,
        tokenizer=inputs["tokenizer"].uri,
        chat_template=inputs["chat_template"].uri if "chat_template" in inputs else None,
        template_date=config.data.template_date,
        template_kwargs=config.data.template_kwargs,
        settings=rl_settings(config, tokenizer),
        rewards=specs(grpo),
        longest_prompt=longest_prompt(config),
        environment=environment(config),
        constraint=constraint(config),
        engine=rollout.engine,
        engine_options=rollout.options,
        reference=inputs["companion"].uri if config.has_kl else None,
        teacher=inputs["companion"].uri if grpo.teacher is not None else None,
        grader_processes=grpo.grader_processes,
        max_mismatch=rollout.max_mismatch,
        max_canary_difference=rollout.max_canary_difference,
        trajectory={"grpo": settings(config)},
    )
