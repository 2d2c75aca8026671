"""Losses and gradients that TRL's own trainers compute on a tiny model, kept for the tests of losses.

    ./infra/env python -m tests.oracles.trl_values tests/unit/losses/trl_values.json

The tests need the JSON alone. Model and reference are ``tiny_job.write_model``'s with the seeds in the JSON, run by
transformers in float64. Batches go through each trainer's own collator and its ``compute_loss``; where a trainer wants
a data set to begin with, it gets one of a few words, which is not used.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.oracles.tiny_job import VOCABULARY, write_model

SEED, REFERENCE_SEED, SCORE_SEED = 3, 4, 5
#: (prompt, chosen, rejected) ids. Prompts of one token: ORPO's likelihood term in TRL is over prompt and answer. Chosen
#: answers of one length: TRL's likelihood terms are means over all tokens of a batch, ours over each answer's
PAIRS = (
    ([7], [3, 9, 27, 17, 51], [5, 25]),
    ([11], [2, 4, 8, 16, 32], [60, 1, 44, 13, 9, 6, 30]),
    ([33], [40, 41, 42, 43, 44], [10]),
)
MARGINS = (0.5, 0.0, 1.25)

#: case -> (name in the registry, our options, TRL's trainer, its options)
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {"beta": 0.3}, "dpo", {"beta": 0.3, "loss_type": "sigmoid"}),
    "sigmoid and sft": (
        "dpo",
        {"beta": 0.3, "sft_weight": 0.7},
        "dpo",
        {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    "sigmoid of means": (
        "dpo",
        {"beta": 0.3, "length_normalise": True},
        "dpo",
        {"beta": 0.3, "loss_type": "sigmoid_norm"},
    ),
    "robust": (
        "dpo",
        {"variant": "robust", "beta": 0.3, "label_smoothing": 0.1},
        "dpo",
        {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1},
    ),
    **{
        name: ("dpo", {"variant": name, "beta": 0.3}, "dpo", {"beta": 0.3, "loss_type": name})
        for name in ("ipo", "hinge", "apo_zero", "apo_down")
    },
    "simpo": (
        "simpo",
        {"beta": 2.0, "target_margin": 0.8},
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.8, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "simpo and sft": (
        "simpo",
        {"beta": 2.0, "target_margin": 0.8, "sft_weight": 0.4},
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.8, "loss_type": "simpo", "cpo_alpha": 0.4},
    ),
    "orpo": ("orpo", {"beta": 0.25}, "orpo", {"beta": 0.25}),
    "kto": (
        "kto",
        {"beta": 0.3, "desirable_weight": 1.5},
        "kto",
        {"beta": 0.3, "loss_type": "apo_zero_unpaired", "desirable_weight": 1.5},
    ),
    "reward": ("reward", {"centre": 0.02}, "reward", {"center_rewards_coefficient": 0.02}),
}


def score_weight() -> torch.Tensor:
    """[1, D] of the score head, float64."""
    return torch.randn(1, 16, generator=torch.Generator().manual_seed(SCORE_SEED), dtype=torch.float64)


def tokenizer() -> Any:
    """A word for each id: TRL wants a tokenizer, whatever the batches are made of."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w0"
    )


def examples_for(trainer: str) -> list[dict[str, Any]]:
    """The pairs in the columns that the trainer's collator reads."""
    if trainer == "dpo":
        return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS]
    if trainer == "reward":
        pairs = zip(PAIRS, MARGINS, strict=True)
        return [{"chosen_ids": p + c, "rejected_ids": p + r, "margin": margin} for (p, c, r), margin in pairs]
    if trainer == "kto":
        return [
            {"prompt_ids": prompt, "completion_ids": answer, "label": label}
            for prompt, *answers in PAIRS
            for answer, label in zip(answers, (True, False), strict=True)
        ]
    return [
        {**_columns("prompt", p, 0), **_columns("chosen", p + c, 1), **_columns("rejected", p + r, 1)}
        for p, c, r in PAIRS
    ]


def _columns(name: str, ids: Sequence[int], untrained: int) -> dict[str, Any]:
    labels = [-100] * untrained + list(ids[untrained:])
    return {f"{name}_input_ids": list(ids), f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}


def build_trainer(kind: str, options: dict[str, Any], folder: Path, model: Any, reference: Any) -> Any:
    """TRL's trainer of a kind."""
    import trl
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    where = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
    }
    trainer, config = where[kind]
    row = (
        {"prompt": "w3", "completion": "w4", "label": True}
        if kind == "kto"
        else {"chosen": "w3 w4", "rejected": "w3 w5"}
    )
    rows = [row, {**row, "label": False} if kind == "kto" else row]
    if kind in ("dpo", "cpo", "orpo"):
        rows = [{"prompt": "w3", "chosen": "w4", "rejected": "w5"}] * 2
    arguments = config(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_dropout=True, **options,
    )  # fmt: skip
    frozen = {"ref_model": reference} if kind in ("dpo", "kto") else {}
    return trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **frozen
    )


def load(folder: Path, kind: str) -> Any:
    """transformers' model of a folder in float64; with a score head for "reward"."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind != "reward":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float64)
    with torch.no_grad():
        model.score.weight.copy_(score_weight())
    return model


def values_of(case: str, folder: Path) -> dict[str, Any]:
    """Loss, and the norm of each parameter's gradient."""
    _, _, kind, options = CASES[case]
    model, reference = load(folder / "policy", kind), load(folder / "reference", kind)
    trainer = build_trainer(kind, options, folder / "out", model, reference)
    batch = trainer.data_collator(examples_for(kind))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in trainer.model.named_parameters()}
    return {"loss_value": loss.item(), "gradient_norms": gradients}


def main() -> None:
    """See the module's text."""
    import transformers
    import trl

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "policy", SEED)
        write_model(folder / "reference", REFERENCE_SEED)
        values = {case: values_of(case, folder) for case in CASES}
    content = {
        "command": "./infra/env python -m tests.oracles.trl_values tests/unit/losses/trl_values.json",
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "pairs": PAIRS,
        "margins": MARGINS,
        "seeds": {"policy": SEED, "reference": REFERENCE_SEED, "score": SCORE_SEED},
        "cases": {case: {"loss": CASES[case][:2], "trl": CASES[case][2:], **values[case]} for case in CASES},
    }
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
