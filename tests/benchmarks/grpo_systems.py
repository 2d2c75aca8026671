"""One run of reinforcement learning in this process, by this project or by TRL; ``tests.benchmarks.grpo`` starts it.

    python -m tests.benchmarks.grpo_systems SYSTEM SETUP.json

prints one line of JSON. Both systems get the same model folder, prompts in the same order, sampling, optimiser and
grader (``rewards: exact``, asked by TRL in its own process, by ours in one that may be killed). TRL runs as its
trainer does on this hardware without vLLM: transformers' ``generate``, float32, no recomputation, all completions of a
step in one batch, the fewest calls that there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.config import RunConfig
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.rl.prompts import PromptOrder, RolloutPrompt, read_prompts
from posttrain_lib.rl.rewards.exact import Exact
from posttrain_lib.schema.rollouts import Answer
from steps import rollouts

if TYPE_CHECKING:
    from posttrain_lib.rl.job import RolloutJob

#: more updates than a run has: what happens every so often never does
_NEVER = 10**9


@dataclass(frozen=True)
class Setup:
    """What a run is told. ``config`` is a run file's content; folders and files are those of its steps."""

    config: dict[str, Any]
    model: str
    prompts: str
    held_out: str
    seed: int
    threads: int


def run_ours(setup: Setup, config: RunConfig, work: Path) -> dict[str, Any]:
    """Rewards, seconds and the controller's figures, one an update."""
    from posttrain_lib.rl.run import train_on_rollouts
    from posttrain_lib.training.job import TrainJob

    job = TrainJob(
        model_folder=setup.model,
        train_store="",
        held_out_store="",
        work_dir=str(work),
        train=config.trained,
        device="cpu",
        threads=setup.threads,
        rollouts=_rollout_job(setup, config),
    )
    assert job.rollouts is not None
    updates = [report for report in train_on_rollouts(job, job.rollouts) if report.step]
    figures = [report.figures for report in updates]
    return {
        "rewards": [each["reward/mean"] for each in figures],
        "seconds": [each["time/batch_seconds"] for each in figures],
        "tokens": [each["rollout/tokens"] for each in figures],
        "figures": [
            {name: value for name, value in each.items() if name.startswith(("time/", "idle/", "rollout/staleness"))}
            for each in figures
        ],
    }


def _rollout_job(setup: Setup, config: RunConfig) -> RolloutJob:
    """The job of the run file, but that nobody looks at the policy in between and nothing is saved before the end."""
    from posttrain_lib.rl.job import RolloutJob
    from posttrain_lib.rl.settings import HeldOut

    grpo = config.grpo
    assert grpo is not None
    settings = rollouts.rl_settings(config, ChatTokenizer(setup.model))
    return RolloutJob(
        prompts=setup.prompts,
        held_out=setup.held_out,
        tokenizer=setup.model,
        settings=dataclasses.replace(settings, save_every=_NEVER, shown=0, held_out=HeldOut(0, 0, _NEVER)),
        rewards=rollouts.specs(grpo),
        longest_prompt=rollouts.longest_prompt(config),
        template_date=config.data.template_date,
        max_mismatch=grpo.rollout.max_mismatch,
        max_canary_difference=grpo.rollout.max_canary_difference,
    )


def run_trl(setup: Setup, config: RunConfig, work: Path) -> dict[str, Any]:
    """Rewards, seconds and mean completion length, one an update."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    torch.set_num_threads(setup.threads)
    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    prompts = asked_prompts(setup, config)
    check_prompts(tokenizer, prompts)
    rows = [{"prompt": [dict(message) for message in one.messages], "answer": one.answer} for one in prompts]
    moments = []

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            moments.append(time.perf_counter())

    trainer = GRPOTrainer(
        setup.model,
        reward_funcs=exact_reward,
        args=_trl_arguments(setup, config, work),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "rewards": [entry["reward"] for entry in logs],
        "seconds": [end - begin for begin, end in itertools.pairwise(moments)],
        "tokens": [entry["completions/mean_length"] for entry in logs],
    }


def _trl_arguments(setup: Setup, config: RunConfig, work: Path) -> Any:
    """The run file's settings by TRL's names."""
    from trl import GRPOConfig

    grpo, train = config.grpo, config.train
    assert grpo is not None
    return GRPOConfig(
        output_dir=str(work),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=train.steps,
        per_device_train_batch_size=grpo.prompts_per_step * grpo.group_size,
        num_generations=grpo.group_size,
        max_completion_length=grpo.rollout.max_new_tokens,
        temperature=grpo.rollout.temperature,
        loss_type="dapo",
        beta=grpo.kl_weight,
        epsilon=grpo.clip_low,
        epsilon_high=grpo.clip_high,
        scale_rewards="group",
        optim="adamw_torch_fused",
        learning_rate=train.optimizer.lr,
        adam_beta1=train.optimizer.betas[0],
        adam_beta2=train.optimizer.betas[1],
        adam_epsilon=train.optimizer.eps,
        weight_decay=train.optimizer.weight_decay,
        max_grad_norm=train.clip_norm,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.schedule.warmup_steps,
        shuffle_dataset=False,
        seed=setup.seed,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        model_init_kwargs={"dtype": torch.float32},
    )


def asked_prompts(setup: Setup, config: RunConfig) -> list[RolloutPrompt]:
    """Every prompt that the run asks, in the order of our visits."""
    assert config.grpo is not None and config.train.steps is not None
    prompts = read_prompts(Path(setup.prompts))
    order = PromptOrder(len(prompts), setup.seed)
    return [prompts[order.prompt_of(visit)] for visit in range(config.train.steps * config.grpo.prompts_per_step)]


def check_prompts(tokenizer: Any, prompts: list[RolloutPrompt]) -> None:
    """The run ends where TRL would ask other tokens than we do."""
    for one in prompts:
        found = tokenizer.apply_chat_template(list(one.messages), add_generation_prompt=True, return_dict=True)
        if tuple(found["input_ids"]) != one.token_ids:
            raise SystemExit(f"grpo: {one.name} is {found['input_ids']} to TRL and {one.token_ids} to us")


def exact_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The grader of the run file as TRL calls a reward."""
    grade = Exact()
    texts = [completion[0]["content"].strip() for completion in completions]
    return [grade(Answer((), text, expected)).value for text, expected in zip(texts, answer, strict=True)]


SYSTEMS: dict[str, Callable[[Setup, RunConfig, Path], dict[str, Any]]] = {"ours": run_ours, "trl": run_trl}


def peak_mib() -> float:
    """Most resident memory of this process so far. ``getrusage`` would count what the process that started it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    """Run the system, tell."""
    system, setup = sys.argv[1], Setup(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    config = RunConfig.model_validate(setup.config)
    if system == "trl":
        import trl.trainer.grpo_trainer  # noqa: F401  before its memory is looked at
    else:
        import posttrain_lib.rl.run  # noqa: F401
    before = peak_mib()
    with tempfile.TemporaryDirectory() as work:
        found = SYSTEMS[system](setup, config, Path(work))
    found |= {"memory_mib": {"imports": before, "peak": peak_mib()}}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
