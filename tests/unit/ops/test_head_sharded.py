"""A vocabulary over two processes against the same head in one piece: values and every gradient."""

from __future__ import annotations

import dataclasses
import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from posttrain_lib.errors import ModelError
from posttrain_lib.ops.head_divergence import linear_divergence, linear_top_divergence
from posttrain_lib.ops.head_regularised import linear_regularised_cross_entropy
from posttrain_lib.ops.head_topk import top_logprobs
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead, VocabularyShard
from posttrain_lib.ops.target_logits import target_logits
from tests.unit.ops.head_cases import TOKENS, Case, Options, make_case

RANKS, ROWS = 2, 18  # 36 rows, of which 33 exist: the second rank holds padding
EXACT = 1e-11  # float64 sums of some hundred terms
TOP = 17  # more than the second rank's 15 entries


def cases() -> tuple[Case, Case]:
    """Student and teacher in one piece, 36 rows."""
    options = Options(padded=True, scale=0.6, softcap=2.5, adapter=True)
    return tuple(cut(make_case(9, options, seed=seed), slice(0, RANKS * ROWS)) for seed in (0, 1))


def cut(case: Case, rows: slice, shard: VocabularyShard | None = None) -> Case:
    """The case with some rows of its head, new leaves of a graph."""
    case = case.to(torch.float64)
    weight, adapter = case.head.weight_VD, case.head.adapter
    assert adapter is not None
    weight, up = (tensor.detach()[rows].clone().requires_grad_() for tensor in (weight, adapter.up_VR))
    adapter = HeadAdapter(adapter.down_RD, up, adapter.scale)
    return dataclasses.replace(
        case, head=dataclasses.replace(case.head, weight_VD=weight, adapter=adapter, shard=shard)
    )


def everything(student: Case, teacher: Case) -> dict[str, list[Tensor]]:
    """Each operation's values and gradients in hidden states, weight and both of the adapter's."""
    hidden, head, index, weights = student.hidden, student.head, student.index, student.loss_weights
    pull = torch.linspace(-1, 1, len(index), dtype=torch.float64)
    everywhere = torch.arange(TOKENS)
    results: dict[str, list[Tensor]] = {}

    def record(name: str, objective: Tensor, *values: Tensor) -> None:
        gradients = torch.autograd.grad(objective, student.inputs())
        results[name] = [value.detach() for value in (objective, *values, *gradients)]

    record("cross-entropy", *linear_cross_entropy(hidden, head, student.targets, weights, index, chunk_tokens=4))
    logprobs, entropy = token_logprobs(hidden, head, student.targets, index, temperature=0.7, with_entropy=True)
    assert entropy is not None
    whole = linear_regularised_cross_entropy(
        *(hidden, head, student.targets, weights, index),
        **{"label_smoothing": 0.2, "z_loss": 0.03, "entropy_bonus": 0.4, "chunk_tokens": 4},
    )
    record("regularised", *whole[:2])
    logits = target_logits(hidden, head, student.targets, index)
    record("target logits", (logits * pull).sum(), logits)
    record("log-probs", (logprobs * pull + entropy * pull.square()).sum(), logprobs, entropy)
    for divergence in ("forward", "reverse", "symmetric", "jensen_shannon"):
        inputs = (hidden, head, teacher.hidden, teacher.head, weights, index)
        record(divergence, *linear_divergence(*inputs, divergence=divergence, chunk_tokens=4))
    kept, ids = top_logprobs(teacher.hidden, teacher.head, everywhere, TOP)
    results["top"] = [kept, ids]
    record(
        "kept", *linear_top_divergence(hidden, head, ids[index, :5], kept[index, :5], weights, index, chunk_tokens=4)
    )
    logits = head.logits(hidden)
    results["logits"] = [logits.detach()]
    record("through logits", (logits.softmax(-1).square().sum(-1)).sum())
    return results


def on_rank(rank: int, folder: Path) -> None:
    """What a process of the group does; its results, or how it failed, are saved in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        group = dist.group.WORLD
        assert group is not None
        shard = VocabularyShard(group, rank * ROWS)
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        result: Any = everything(*(cut(case, rows, shard) for case in cases()))
        refusal = pytest.raises(ModelError, match="spread their vocabularies differently")
        student, teacher = cut(cases()[0], rows, shard), cases()[1]
        with refusal:
            linear_divergence(
                student.hidden, student.head, teacher.hidden, teacher.head, student.loss_weights, student.index
            )
        with pytest.raises(ModelError, match="nothing but padding"):
            OutputHead(torch.zeros(ROWS, 2), vocab_size=ROWS, shard=VocabularyShard(group, ROWS))
    except BaseException:
        result = traceback.format_exc()
        raise
    finally:
        torch.save(result, folder / f"{rank}.pt")
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=on_rank, args=(rank, tmp_path)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    expected = everything(*cases())
    for process in processes:
        process.join(timeout=120)
        assert not process.is_alive()
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert not isinstance(found, str), found
        assert found.keys() == expected.keys()
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        for name, tensors in expected.items():
            for got, wanted in zip(found[name], tensors, strict=True):
                if got.shape != wanted.shape:  # the weight's or up_VR's gradient: this rank's rows of it
                    wanted = wanted[rows]
                torch.testing.assert_close(
                    got, wanted, rtol=0, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}"
                )
