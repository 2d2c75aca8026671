"""One job of reinforcement learning in this process: its roles are made, and the controller runs them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.parallel.compilation import check_compiler
from posttrain_lib.registry import check_options, resolve
from posttrain_lib.rl.advantages import rule_of
from posttrain_lib.rl.controller import Controller, Roles
from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.figures import MEASURES
from posttrain_lib.rl.ledger import LEDGER, Ledger
from posttrain_lib.rl.playing import Playing, make_playing
from posttrain_lib.rl.prompts import fitting, read_prompts
from posttrain_lib.rl.ranks import Models, models_here
from posttrain_lib.rl.rewards.pool import GraderPool
from posttrain_lib.rl.sync_guard import SyncGuard
from posttrain_lib.rl.version_log import VersionLog
from posttrain_lib.training import pulse
from posttrain_lib.training.device import pick_device, reproducible

if TYPE_CHECKING:
    from posttrain_lib.rl.engine.stop_strings import Decode
    from posttrain_lib.rl.job import RolloutJob
    from posttrain_lib.rl.prompts import RolloutPrompt
    from posttrain_lib.rl.roles import RolloutRole
    from posttrain_lib.schema.reports import StepReport, TrainResult
    from posttrain_lib.training.job import TrainJob

#: answers kept to be read, one a line, in the job's work folder
ANSWERS = "rollouts.jsonl"
#: prompts that engine and trainer are compared on at every push
_CANARIES = 4
#: largest difference of one of their log-probabilities, by precision: bfloat16 rounds logits of 16 by 0.06
_CANARY_BOUNDS = {"fp32": 0.05, "bf16": 0.5}
_SLOTS = 128
_ENGINE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ENGINES: dict[str, str] = {
    "embedded": "posttrain_lib.rl.run:embedded_engine",
    "vllm": "posttrain_lib.adapters.vllm_engine:vllm_engine",
}


def train_on_rollouts(
    job: TrainJob, rollouts: RolloutJob, models: Models = models_here
) -> Generator[StepReport, None, TrainResult]:
    """Run a job to its end; see ``training.loop.train``. ``models`` makes policy and reference, wherever they run.

    Raises:
        ConfigError: an engine, a grader or a loss that cannot be made. DataError: no prompt that fits.
        RolloutError: the engine failed, or its weights are not the policy's. TrainingError: an update went wrong.
        PreemptedError: a stop was asked for; a checkpoint is written.
    """
    device = pick_device(job.device, job.rank)
    if job.train.compile != "none":
        check_compiler(device)
    with reproducible(job.train.seed, job.threads):
        notes: list[str] = []
        work = Path(job.work_dir)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(rollouts)
        template = rollouts.chat_template or rollouts.tokenizer
        stop_ids = rollouts.settings.sampling.stop_ids
        playing = make_playing(tokenizer, rollouts.environment, rollouts.constraint, stop_ids, template)
        prompts, held_out = _prompts(rollouts, playing, notes)
        with _roles(job, rollouts, models, device, tokenizer.decode, prompts, notes.append) as roles:
            controller = Controller(
                prompts,
                held_out,
                roles,
                rollouts.settings,
                playing.play,
                Ledger(VersionLog(work / LEDGER)),
                VersionLog(work / ANSWERS),
            )
            for report in controller.run():
                yield _with_notes(report, notes)
            return dataclasses.replace(
                roles.policy.result(),
                first_held_out=controller.first_held_out,
                held_out_is=MEASURES[controller.measure or "reward"],
            )


@contextlib.contextmanager
def _roles(
    job: TrainJob,
    rollouts: RolloutJob,
    models: Models,
    device: torch.device,
    decode: Decode,
    prompts: Sequence[RolloutPrompt],
    say: Callable[[str], None],
) -> Iterator[Roles]:
    """Every role, made; and given up at the end, the last made first. What is cheap to refuse comes first."""
    settings = rollouts.settings
    rule_of(settings.advantage)
    with contextlib.ExitStack() as closing:
        pulse.beat("graders")
        graders = GraderPool(rollouts.rewards, workers=rollouts.grader_processes)
        closing.callback(graders.close)
        graders.check()
        pulse.beat("policy")
        policy, frozen = closing.enter_context(models(job, device, say))
        pulse.beat("engine")
        make_engine = check_engine(rollouts.engine, rollouts.engine_options)
        window = rollouts.longest_prompt + settings.sampling.max_new_tokens
        engine: RolloutRole = make_engine(
            job.model_folder,
            window=window,
            decode=decode,
            device=engine_device(device, job.world, settings.placement, say),
            **rollouts.engine_options,
        )
        closing.callback(engine.close)
        # One token alone has nothing before it that would make it likely.
        canaries = [prompt.token_ids if len(prompt.token_ids) > 1 else prompt.token_ids * 2 for prompt in prompts]
        bound = rollouts.max_canary_difference or _CANARY_BOUNDS[job.train.precision]
        guard = SyncGuard(canaries[:_CANARIES], bound=bound)
        teaches = rollouts.teacher is not None
        yield Roles(policy, engine, graders, guard, None if teaches else frozen, frozen if teaches else None)


def engine_device(device: torch.device, ranks: int, placement: str, say: Callable[[str], None]) -> torch.device:
    """Where the engine computes: with the policy's first rank, or ("split") on the CUDA device behind its last one."""
    if placement != "split" or device.type != "cuda":
        return device
    if torch.cuda.device_count() <= ranks:
        say("grpo.placement is split, and there is no device besides the policy's: the engine shares it, and is awake")
        return device
    return torch.device("cuda", ranks)


def check_engine(name: str, options: Mapping[str, Any]) -> Callable[..., RolloutRole]:
    """What makes the engine of that name, which takes these options; nothing is made.

    Raises:
        ConfigError: no such engine, options that it does not take, or of the embedded one values.
    """
    make: Callable[..., RolloutRole] = resolve(name, ENGINES, what="rollout engine", where="grpo.rollout.engine")
    given = ("window", "decode", "device")
    check_options(make, options, what="rollout engine", where="grpo.rollout.options", leading=1, given=given)
    if name == "embedded":
        _check_embedded(**options)
    return make


def embedded_engine(
    folder: str, *, window: int, decode: Decode, device: torch.device, slots: int = _SLOTS, dtype: str = "float32"
) -> EmbeddedEngine:
    """The engine over our own definition of the model in ``folder``; its weights come with the first push.

    Args:
        window: most tokens of a prompt and its answer. slots: answers that are written at once.
        dtype: of its weights and arithmetic: float32, or bfloat16.

    Raises:
        ConfigError: another dtype, or no slots.
    """
    _check_embedded(slots, dtype)
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=_ENGINE_DTYPES[dtype], device=device).eval().requires_grad_(False)
    return EmbeddedEngine(model, spec, window=window, slots=slots, decode=decode)


def _check_embedded(slots: int = _SLOTS, dtype: str = "float32") -> None:
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ConfigError(
            "the embedded engine needs slots for answers",
            where="grpo.rollout.options.slots",
            got=slots,
            expected="a whole number, 1 or more",
        )
    if dtype not in _ENGINE_DTYPES:
        raise ConfigError(
            "the embedded engine does not compute in this dtype",
            where="grpo.rollout.options.dtype",
            got=dtype,
            expected=", ".join(_ENGINE_DTYPES),
        )


def _tokenizer(rollouts: RolloutJob) -> ChatTokenizer:
    return ChatTokenizer(
        rollouts.tokenizer,
        chat_template=rollouts.chat_template,
        template_date=rollouts.template_date,
        template_kwargs=dict(rollouts.template_kwargs),
    )


def _prompts(
    rollouts: RolloutJob, playing: Playing, notes: list[str]
) -> tuple[list[RolloutPrompt], list[RolloutPrompt]]:
    """(prompts of training, held-out ones), those that leave room for an answer; the others are told of."""
    found = []
    for path in (rollouts.prompts, rollouts.held_out):
        kept, long = fitting(playing.asked(read_prompts(Path(path))), rollouts.longest_prompt)
        if long:
            notes.append(
                f"{len(long)} prompts of more than {rollouts.longest_prompt} tokens are left out: {long[0].name} ..."
            )
        if not kept:
            raise DataError(
                "no prompt leaves room for an answer",
                where=path,
                got=f"{len(long)} prompts",
                expected=f"at most {rollouts.longest_prompt} tokens",
                fix="raise train.row_tokens, or lower grpo.rollout.max_new_tokens",
            )
        found.append(kept)
    return found[0], found[1]


def _with_notes(report: StepReport, notes: list[str]) -> StepReport:
    """The report with what a person should read, once."""
    said, notes[:] = list(notes), []
    return dataclasses.replace(report, event=", ".join([*([report.event] if report.event else []), *said]))
