"""TRL's policy gradient on tensors of ours: its trainer's own loss, without a trainer, and the smallest real trainer.

Where TRL's conventions differ from ours:

    advantages    TRL adds 1e-4 to a group's standard deviation, we 1e-6; both deviations are the unbiased ones
    cispo         TRL's ``epsilon_high`` bounds the ratio itself, ours comes on top of 1; TRL has no lower bound
    delta         our ``dual_clip``: equal from ``1 + clip_high`` on, below which TRL bounds good tokens too
    bnpo          our "token" over one micro-batch; "dapo" is "token" over all of the step, as ours always is
    dr_grpo       divides by completions times ``max_completion_length``: our horizon
    beta          TRL multiplies the KL by the ratio unless ``use_bias_correction_kl`` is off, which it is here unless
                  asked for; with ratios of sequences by the completion's, where our ``kl_unbiased`` takes the token's
    correction    TRL's "token_truncate" at most 3 by default, we at most 2; its "token_mask" takes any two bounds, ours
                  are a number and one over it
                  With ratios of sequences its gradient gives each token the completion's mean correction, ours its own
    clip figures  TRL counts tokens beyond a bound by advantage; ours also those that ``dual_clip`` leaves alone
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

#: TRL's own options of a loss -> where its trainer keeps them
_OF_TRAINER = ("loss_type", "importance_sampling_level", "beta", "epsilon_low", "epsilon_high", "max_completion_length")


def loss_of_trl(
    logprobs_BR: Tensor, mask_BR: Tensor, advantages_B: Tensor, signals: dict[str, Tensor], **options: Any
) -> Tensor:
    """``GRPOTrainer._compute_loss`` of one micro-batch, scalar.

    Args:
        logprobs_BR: of the policy, zero behind a completion's end, where ``mask_BR`` is too.
        signals: further inputs of that name, [B, R]: ``old_per_token_logps``, ``ref_per_token_logps`` with ``beta``,
            ``importance_sampling_ratio``, which stands for a run with vLLM.
        options: ``loss_type`` and others of ``GRPOConfig``, as its trainer calls them.
    """
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    unbiased = options.get("use_bias_correction_kl", False)
    corrected = "importance_sampling_ratio" in signals
    defaults = {"importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2}
    trainer = SimpleNamespace(
        **{**defaults, "max_completion_length": None, **{k: v for k, v in options.items() if k in _OF_TRAINER}},
        args=SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=unbiased, steps_per_generation=1),
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(cpu=True),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BR, torch.zeros_like(logprobs_BR), None),
    )
    ids = mask_BR.long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask_BR,
        "advantages": advantages_B,
        "num_items_in_batch": mask_BR.sum(),
        **signals,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def make_trainer(
    folder: Path, model: Path, rewards: Sequence[float], *, group: int, completion: int, **options: Any
) -> Any:
    """A GRPOTrainer over the float64 model of a folder (``tiny_job.write_model``), which grades by position.

    ``_generate_and_score_completions`` of it takes rows ``{"prompt": "w3 w4"}``, each repeated ``group`` times.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.oracles.trl_values import tokenizer

    arguments = GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_generations=group,
        per_device_train_batch_size=len(rewards),
        max_completion_length=completion,
        model_init_kwargs={"dtype": torch.float64},
        **options,
    )
    trainer = GRPOTrainer(
        str(model),
        reward_funcs=lambda completions, **_: list(rewards),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w3"}] * len(rewards)),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer
