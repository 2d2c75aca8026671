"""Module by module: what each computes in ours and in transformers', in order of execution."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.checkpoint.verify_report import ModuleDifference
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.ops.attention import DocumentLayout

# Two valid float32 orders of summation differ from the exact result by errors of one size but not of one value; the
# largest of some 10^5 such errors varies between runs by less than a factor of 2, a fused attention kernel
# (ours) and separate products (the reference's) by another. 8 leaves room for both. The faults that the gate is for
# (a wrong constant, tensor or order) are above it by a factor of 100 and more; tests measure that.
NOISE_FACTOR = 8.0
# Where the reference's float32 happens to be exact (an embedding lookup), one rounding is still allowed.
_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Documents:
    """Random documents, laid end to end. ``token_ids`` int64 [T]."""

    token_ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def random(cls, spec: ModelSpec, lengths: tuple[int, ...], seed: int) -> Documents:
        """Uniform token ids; lengths are cut to what the model's positions allow."""
        fitting = tuple(min(length, spec.config.max_position_embeddings) for length in lengths)
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randint(spec.config.vocab_size, (sum(fitting),), generator=generator), fitting)

    @staticmethod
    def places(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(positions int64 [T], cu_seqlens int32 [n+1])."""
        positions = torch.cat([torch.arange(length) for length in lengths])
        ends = [0, *itertools.accumulate(lengths)]
        return positions, torch.tensor(ends, dtype=torch.int32)

    @property
    def positions(self) -> Tensor:
        """int64 [T], from 0 in each document."""
        return self.places(self.lengths)[0]

    def alone(self, index: int) -> Documents:
        """One of the documents by itself."""
        return Documents(self.token_ids.split(self.lengths)[index], (self.lengths[index],))

    def packed_logits(self, model: Decoder) -> Tensor:
        """[T, V] of ours, all documents in one row."""
        positions, cu_seqlens = self.places(self.lengths)
        with torch.no_grad():
            return model(self.token_ids, positions, cu_seqlens, max(self.lengths))

    def reference_logits(self, reference: nn.Module) -> Tensor:
        """[T, V] of transformers', each document by itself."""
        from posttrain_lib.adapters.hf_reference import reference_logits

        return torch.cat([reference_logits(reference, part) for part in self.token_ids.split(self.lengths)])


def largest(values: Tensor) -> float:
    """Largest magnitude; NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0


def noise_limit(floor: float, exact: Tensor) -> float:
    """The largest difference that rounding explains, given the reference's own."""
    return NOISE_FACTOR * floor + _ROUNDING * largest(exact)


def one_layer_spec(spec: ModelSpec, layer: int) -> ModelSpec:
    """The spec of a decoder that has only this layer, and no vocabulary to speak of."""
    config = dataclasses.replace(
        spec.config, num_hidden_layers=1, windows=(spec.config.windows[layer],), vocab_size=1, tie_word_embeddings=True
    )
    return dataclasses.replace(spec, config=config)


def run_block(decoder: Decoder, hidden_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[T, D] through the decoder's only layer, as the decoder itself would run it."""
    positions, cu_seqlens = Documents.places(lengths)
    cosine, sine = decoder.rope_tables(positions)
    return decoder.layers[0](hidden_TD, cosine, sine, DocumentLayout.of(cu_seqlens, max(lengths)))


# In order of execution. "input" looks at what goes into the module: the result of what has no module of its own.
_LAYER_STEPS = (
    ("input_norm", "input_norm", "output"),
    ("attention.q_proj", "attention.q_proj", "output"),
    ("attention.k_proj", "attention.k_proj", "output"),
    ("attention.v_proj", "attention.v_proj", "output"),
    ("attention.q_norm", "attention.q_norm", "output"),
    ("attention.k_norm", "attention.k_norm", "output"),
    ("attention", "attention.o_proj", "input"),
    ("attention.o_proj", "attention.o_proj", "output"),
    ("post_attention_norm", "post_attention_norm", "output"),
    ("mlp.gate_proj", "mlp.gate_proj", "output"),
    ("mlp.up_proj", "mlp.up_proj", "output"),
    ("mlp", "mlp.down_proj", "input"),
    ("mlp.down_proj", "mlp.down_proj", "output"),
)
_BETWEEN = {
    "attention": "its projections agree: rotary embedding, head grouping, scale or mask",
    "mlp": "its projections agree: activation or product",
}


@dataclass(frozen=True)
class _Step:
    name: str
    ours: str
    theirs: str
    side: str


def _steps(spec: ModelSpec) -> list[_Step]:
    names = {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for ours, theirs in spec.weight_map}
    steps = [
        _Step("embed_tokens", "embed_tokens", names["embed_tokens"], "output"),
        _Step("rotary_embedding", "", "model.rotary_emb", "rotary"),
    ]
    for layer in range(spec.config.num_hidden_layers):
        for name, module, side in _LAYER_STEPS:
            theirs = names.get(f"layers.{{n}}.{module}")
            if theirs is not None:
                prefix = f"layers.{layer}."
                steps.append(_Step(prefix + name, prefix + module, theirs.format(n=layer), side))
    steps.append(_Step("norm", "norm", names["norm"], "output"))
    steps.append(_Step("lm_head", "", names["lm_head"], "logits"))
    return steps


def compare_modules(
    model: Decoder,
    spec: ModelSpec,
    reference: Callable[[torch.dtype], nn.Module],
    run_ours: Callable[[Decoder], Tensor | None],
    run_theirs: Callable[[nn.Module], object],
    positions: Tensor,
) -> list[ModuleDifference]:
    """Differences of every module that runs, in order of execution.

    Args:
        reference: makes the reference in a dtype; called for one at a time.
        run_ours: runs our model on packed documents; returns logits [T, V] or None where no head runs.
        run_theirs: runs the reference on the same tokens, in the same order.
        positions: int64 [T] of the documents.
    """
    steps = _steps(spec)
    with _recorded(model, [(step.name, step.ours, step.side) for step in steps], batched=False) as ours:
        logits = run_ours(model)
    ours["rotary_embedding"] = [_whole_tables(*model.rope_tables(positions))]
    if logits is not None:
        ours["lm_head"] = [logits]
    records, parameters = [], {}
    for dtype in (torch.float32, torch.float64):
        theirs = reference(dtype)
        parameters = {name: value.detach() for name, value in theirs.named_parameters(remove_duplicate=False)}
        with _recorded(theirs, [(step.name, step.theirs, step.side) for step in steps], batched=True) as record:
            run_theirs(theirs)
        records.append(record)
        del theirs
    ran = [step for step in steps if step.name in records[1] or step.name in ours]
    return [_explain(_compare(step, ours, *records), model, parameters) for step in ran]


def _compare(step: _Step, ours: dict[str, list[Tensor]], coarse: Any, fine: Any) -> ModuleDifference:
    if step.name not in ours or step.name not in fine:
        side = "transformers has" if step.name in fine else "ours has"
        return ModuleDifference(step.name, step.theirs, math.inf, 0.0, False, f"only {side} this module")
    exact, rounded, got = torch.cat(fine[step.name]), torch.cat(coarse[step.name]), torch.cat(ours[step.name])
    if got.shape != exact.shape:
        detail = f"shape {list(got.shape)}, transformers' is {list(exact.shape)}"
        return ModuleDifference(step.name, step.theirs, math.inf, 0.0, False, detail)
    difference, limit = largest(got - exact), noise_limit(largest(rounded - exact), exact)
    return ModuleDifference(step.name, step.theirs, difference, limit, difference <= limit)


def _explain(item: ModuleDifference, model: Decoder, theirs: dict[str, Tensor]) -> ModuleDifference:
    """Where a module is wrong, look at its parameters: a missing one, other values, a transposed one."""
    if item.passed or item.detail is not None:
        return item
    kind = item.name.split(".")[-1]
    detail = _BETWEEN.get(kind) or _parameter_fault(item, dict(model.named_parameters()), theirs)
    return ModuleDifference(item.name, item.reference, item.difference, item.limit, False, detail)


def _parameter_fault(item: ModuleDifference, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    for kind in ("weight", "bias"):
        name = f"{item.name}.{kind}"
        if item.name == "lm_head" and name not in ours and kind == "weight":
            name = "embed_tokens.weight"
        left, right = ours.get(name), theirs.get(f"{item.reference}.{kind}")
        if left is None and right is None:
            continue
        if left is None or right is None:
            return f"parameter {name} exists only in {'transformers' if left is None else 'ours'}"
        left = left.detach().to(right.dtype)
        if left.shape != right.shape:
            return f"parameter {name} has shape {list(left.shape)}, transformers' {list(right.shape)}"
        if torch.equal(left, right):
            continue
        turned = left.dim() == 2 and left.shape[0] == left.shape[1] and torch.equal(left.t(), right)
        return f"parameter {name} is transposed" if turned else f"parameter {name} has other values"
    return "its parameters agree: a constant of the module (eps, angle, order of operations) does not"


def _whole_tables(cosine: Tensor, sine: Tensor) -> Tensor:
    """Our half-width tables as transformers keeps them: [T, 2 H], cosine and sine, each half repeated."""
    return torch.cat([cosine, cosine, sine, sine], dim=-1).squeeze(1)


@contextmanager
def _recorded(
    model: nn.Module, steps: list[tuple[str, str, str]], *, batched: bool
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the named modules compute, as [tokens, features], while the block runs.

    ``batched``: the model carries a batch of one, as transformers' does. Heads follow their token on both sides, so
    that flattening them is the same.
    """
    record: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(name: str, side: str, args: Any, result: Any) -> None:
        if side == "rotary":
            value = torch.cat(result, dim=-1)
        else:
            value = args if side == "input" else result
            value = value[0] if isinstance(value, tuple) else value
        rows = value.detach()[0] if batched else value.detach()
        record.setdefault(name, []).append(rows.flatten(1))

    handles = [
        modules[module].register_forward_hook(
            lambda _module, args, result, name=name, side=side: keep(name, side, args, result)
        )
        for name, module, side in steps
        if module and module in modules
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
