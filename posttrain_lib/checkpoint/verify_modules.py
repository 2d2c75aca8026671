"""Module by module: what each computes in ours and in transformers', in transformers' order of execution.

The steps follow from the specification: a module of ours and the module that has its stored tensors, whatever that is
called. Where one of theirs holds several of ours, its features are compared in slices. What has no module of its own
(attention between its projections, the product of a feed-forward) is what goes into the module behind it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain_lib.adapters.hf_reference_parts import layer_kinds
from posttrain_lib.checkpoint.verify_comparison import Comparison
from posttrain_lib.checkpoint.verify_documents import largest, noise_limit, places
from posttrain_lib.checkpoint.verify_parameters import parameter_fault
from posttrain_lib.checkpoint.verify_report import ModuleDifference
from posttrain_lib.checkpoint.verify_routing import dense
from posttrain_lib.checkpoint.verify_subject import Subject
from posttrain_lib.models.spec import GatedDeltaConfig, Mixer, ModelSpec, layer_number

# What goes into these is the result of what has no module: in words, where it is wrong and its parameters are not.
_BEHIND = {
    "attention.o_proj": "rotary embedding, head grouping, scale, soft cap, sinks, gate or mask differs",
    "attention.out_proj": "the norm's gate differs",
    "mlp.down_proj": "activation or product differs",
    "mlp.shared.down_proj": "activation or product differs",
}
_RECURRENCE = "convolution, decay, beta or recurrence differs"
_NORM = "a constant of the norm (eps, 1 + weight, order) differs"
_LINEAR = "what goes in differs: a norm before it, or its place"


@dataclass(frozen=True)
class Step:
    """A module of ours, the module of theirs, and what of the two is compared: ``rows`` of their features.

    ``name`` is what a report calls it; ``hint`` what can be wrong where no parameter is. ``experts``: how many a router
    chooses from.
    """

    name: str
    ours: str
    theirs: str
    side: Literal["input", "output", "choices"] = "output"
    rows: slice | None = None
    experts: int = 0
    hint: str = _NORM


def steps_of(spec: ModelSpec, in_memory: Mapping[str, str]) -> list[Step]:
    """The steps of a decoder. ``in_memory``: stored name -> name of the reference's parameter; what it lacks has no
    counterpart and no step."""
    found: dict[tuple[str, str], Step] = {}
    layers: dict[int, str] = {}
    for piece in spec.pieces:
        if piece.theirs not in in_memory:
            continue
        module, _, kind = piece.ours.rpartition(".")
        theirs = in_memory[piece.theirs].rpartition(".")[0]
        layer = layer_number(module + ".")
        if layer is not None and ".layers." in theirs:
            layers.setdefault(layer, theirs[: theirs.index(".layers.")] + f".layers.{layer}")
        if layer is None:
            steps = [Step(module, module, theirs)] if module == "norm" else []
        elif module.endswith(".mlp.experts"):
            steps = list(_of_experts(module, theirs, spec.parameter_shapes()[piece.ours][0]))
        elif kind == "weight" and not module.endswith(".mlp.router"):  # which is seen by what it gives the experts
            rows = piece.their_index[0]
            mixer = spec.config.layers[layer].attention
            steps = list(_of_weight(module, theirs, rows if isinstance(rows, slice) else None, mixer))
        else:
            steps = []
        for step in steps:
            found.setdefault((step.ours, step.side), step)
    for layer, theirs in layers.items():
        found[f"layers.{layer}", "output"] = Step(
            f"layers.{layer}",
            f"layers.{layer}",
            theirs,
            hint="its parts agree: residual scale or order of the parts differs",
        )
    # What the first module behind the embedding is given: families scale it in one place or another.
    behind = found.get(("norm", "output")) if not layers else Step("", "layers.0", layers.get(0, ""))
    if behind is not None:
        hint = "the embedding's scale differs"
        found[behind.ours, "input"] = Step("embed_tokens", behind.ours, behind.theirs, "input", hint=hint)
    return list(found.values())


def _of_experts(module: str, theirs: str, experts: int) -> Iterator[Step]:
    router = module.removesuffix("experts") + "router"
    yield Step(router, module, theirs, "choices", experts=experts, hint="scores, choice or scale differ")
    yield Step(module, module, theirs, hint="activation or order of the experts' products differs")


def _of_weight(module: str, theirs: str, rows: slice | None, mixer: Mixer) -> Iterator[Step]:
    """The steps of a module with one weight: what goes in, where nothing else shows it, and what comes out."""
    layer, inside = module.split(".", 2)[1:]
    prefix = f"layers.{layer}."
    if inside == "attention.norm" and isinstance(mixer, GatedDeltaConfig):
        yield Step(f"{prefix}attention", module, theirs, "input", hint=_RECURRENCE)
        return  # theirs is gated, ours is not
    if inside == "pre_mlp_norm":
        hint = "residual scale, or the order of norms, differs"
        yield Step(f"{prefix}after_attention", module, theirs, "input", hint=hint)
    if inside in _BEHIND:
        name = "attention.norm" if inside == "attention.out_proj" else inside.rpartition(".")[0]
        yield Step(prefix + name, module, theirs, "input", hint=_BEHIND[inside])
    hint = _NORM if module.endswith("norm") else _LINEAR
    yield Step(module, module, theirs, rows=rows, hint=hint)


def compare_modules(it: Comparison) -> list[ModuleDifference]:
    """Differences of every module that runs, in order of execution, under names of the whole model."""
    subject = it.subject
    steps = steps_of(subject.spec, it.in_memory)
    if subject.layer is not None:
        steps = [step for step in steps if step.name not in ("norm", "embed_tokens")]
    told = it.coarse.routing.choices
    with _recorded(subject.model, [(step, step.ours) for step in steps], (sum(subject.lengths),)) as ours:
        last = it.run(subject.model, told=told).output
    records = []
    for reference in (it.coarse_reference, it.fine_reference):
        with _recorded(reference, [(step, step.theirs) for step in steps], subject.lengths) as record:
            result = it.theirs(reference, told=told).output
        records.append((record, result))
    (coarse, coarse_last), (fine, fine_last) = records
    by_name = {step.name: step for step in steps}
    ran = [by_name[name] for name in fine] + [step for step in steps if step.name in ours and step.name not in fine]
    found = [_compare(step, ours, coarse, fine) for step in ran]
    if subject.layer is None:
        name = "score" if subject.spec.config.score_head else "lm_head"
        by_name[name] = head = Step(name, name, name, hint="scale or soft cap of the logits differs")
        found.append(_compare(head, {name: last}, {name: coarse_last}, {name: fine_last}))
    found = _rotary(it) + found
    return [_explained(item, by_name.get(item.name), subject) for item in found]


def _compare(
    step: Step, ours: Mapping[str, Tensor], coarse: Mapping[str, Tensor], fine: Mapping[str, Tensor]
) -> ModuleDifference:
    if step.name not in ours or step.name not in fine:
        side = "transformers has" if step.name in fine else "ours has"
        return ModuleDifference(step.name, step.theirs, math.inf, 0.0, False, f"only {side} this module")
    exact, rounded, got = fine[step.name], coarse[step.name], ours[step.name]
    if step.rows is not None and got.shape != exact.shape:
        exact, rounded = exact[:, step.rows], rounded[:, step.rows]
    if got.shape != exact.shape:
        detail = f"shape {list(got.shape)}, transformers' is {list(exact.shape)}"
        return ModuleDifference(step.name, step.theirs, math.inf, 0.0, False, detail)
    difference, limit = largest(got - exact), noise_limit(largest(rounded - exact), exact)
    return ModuleDifference(step.name, step.theirs, difference, limit, difference <= limit)


def _explained(item: ModuleDifference, step: Step | None, subject: Subject) -> ModuleDifference:
    """Under its name in the whole model; and where a module is wrong, look at its parameters first."""
    detail = item.detail
    if not item.passed and detail is None and step is not None:
        tied = step.name == "lm_head" and subject.spec.config.tie_word_embeddings
        module = "embed_tokens" if tied else step.name
        detail = parameter_fault(module, subject) or f"its parameters agree: {step.hint}"
    return dataclasses.replace(
        item, name=subject.named(item.name), reference=subject.named(item.reference), detail=detail
    )


def _rotary(it: Comparison) -> list[ModuleDifference]:
    """The tables of cosine and sine, of each rotary embedding that the specification has."""
    subject, config = it.subject, it.subject.spec.config
    calls = _rotary_calls(it)
    tables = subject.model.rope_tables(*places(subject.lengths[:1]))
    kinds = layer_kinds(it.coarse_reference)
    found: dict[str, ModuleDifference] = {}
    for number, layer in enumerate(config.layers):
        rope, own = layer.attention.rope, subject.model.config.layers[number].attention.rope
        key = kinds[number] if kinds and kinds[number] in calls else None
        if rope is None or own is None or key not in calls:
            continue
        name = "rotary_embedding" + (f".{config.ropes.index(rope)}" if len(config.ropes) > 1 else "")
        mine = torch.cat(tables[subject.model.config.ropes.index(own)], dim=-1).squeeze(1)
        found.setdefault(name, _compare_rotary(name, mine, calls[key], rope.dims))
    return list(found.values())


def _rotary_calls(it: Comparison) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Kind of layer -> (cosine, sine) [S, dims] of the first document, by transformers; None: for all layers."""
    module = getattr(it.coarse_reference.model, "rotary_emb", None)
    calls: dict[str | None, tuple[Tensor, Tensor]] = {}
    if module is None or not it.subject.spec.config.ropes:
        return calls

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: tuple[Tensor, Tensor]) -> None:
        kind = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), None)
        calls.setdefault(kind, (result[0][0], result[1][0]))

    handle = module.register_forward_hook(
        lambda _module, args, kwargs, result: keep(args, kwargs, result), with_kwargs=True
    )
    try:
        it.theirs(it.coarse_reference, documents=1)
    finally:
        handle.remove()
    return calls


def _compare_rotary(name: str, mine: Tensor, theirs: tuple[Tensor, Tensor], dims: int) -> ModuleDifference:
    # transformers keeps each half twice, save in gpt-oss.
    whole = torch.cat([part[:, : dims // 2] if part.shape[-1] == dims else part for part in theirs], dim=-1)
    if mine.shape != whole.shape:
        turned = f"{mine.shape[-1]} entries of a head turn, transformers turns {whole.shape[-1]}"
        return ModuleDifference(name, "model.rotary_emb", math.inf, 0.0, False, turned)
    # Both are float32: one rounding of a frequency, times the position.
    off, limit = largest(mine - whole), noise_limit(0.0, whole) * len(mine)
    detail = None if off <= limit else "a frequency, or the factor on cosine and sine, differs"
    return ModuleDifference(name, "model.rotary_emb", off, limit, off <= limit, detail)


@contextmanager
def _recorded(
    model: nn.Module, wanted: Iterable[tuple[Step, str]], lengths: tuple[int, ...]
) -> Iterator[dict[str, Tensor]]:
    """Collect what goes into or comes out of the named modules, as [tokens, features] by step, in order of execution.

    ``lengths``: tokens of each call of the model; heads follow their token, or stand before it.
    """
    parts: dict[str, list[Tensor]] = {}
    record: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(step: Step, value: Any) -> None:
        if isinstance(value, tuple):
            value = value[0]
        parts.setdefault(step.name, []).append(value.detach().clone())  # theirs may go on in place (OLMoE's clipping)

    def before(step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = (*args, *kwargs.values())
        if step.side == "choices":
            parts.setdefault(step.name, []).append(dense((values[1], values[2]), step.experts))
        elif step.side == "input":
            keep(step, args[0] if args else kwargs.get("hidden_states", values[0]))

    handles = []
    for step, name in wanted:
        if name not in modules:
            continue
        if step.side == "output":
            handles.append(modules[name].register_forward_hook(lambda _m, _a, result, step=step: keep(step, result)))
        else:
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda _m, args, kwargs, step=step: before(step, args, kwargs), with_kwargs=True
                )
            )
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
    record.update({name: _by_token(values, lengths) for name, values in parts.items()})


def _by_token(values: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """[T, features] of one value per call: tokens first, or behind a batch of one, or behind the heads."""
    calls = list(zip(values, lengths, strict=True))
    calls = [(value[0] if value.dim() > 2 and len(value) == 1 else value, length) for value, length in calls]
    if any(value.dim() > 2 and len(value) != length for value, length in calls):
        calls = [(value.transpose(0, 1) if value.dim() > 2 else value, length) for value, length in calls]
    return torch.cat([value.reshape(length, -1) for value, length in calls])
