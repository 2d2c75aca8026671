"""The checks of the gate, each a function from a comparison to what it found; :data:`CHECKS` is the list of them.

Every limit comes from rounding that the same run measures on the reference itself. Where a limit has a factor, the
reason stands beside it.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from posttrain_lib.checkpoint.verify_comparison import Comparison, Run, parameters
from posttrain_lib.checkpoint.verify_documents import largest, noise_limit
from posttrain_lib.checkpoint.verify_gradients import check_gradients, check_packed_gradients
from posttrain_lib.checkpoint.verify_report import Finding
from posttrain_lib.checkpoint.verify_routing import routed, swap_limit
from posttrain_lib.checkpoint.verify_subject import experts_of
from posttrain_lib.models.norm import RMSNorm
from posttrain_lib.ops.cache import KeyValueCache

CheckFunction = Callable[[Comparison], list[Finding]]

# Two bfloat16 runs that round in different places are both off by one unit of the floor, so that their mean distance is
# sqrt(2) of it; a mean over thousands of values varies by a few per cent between runs, so 2 leaves room enough.
_MEAN_FACTOR = 2.0
# A norm that rounds where the reference does gives the same bits save where float32 sums of another order fall on two
# sides of a rounding: one value in thousands. One that rounds elsewhere is off by a unit in every third value or so.
_SAME_ROUNDING = 1 / 16
# Times the training length. The angle between far positions shows a frequency that is wrong in its last digits.
_FAR = 4
_STEPS = 8  # of cached generation


def check_float32(it: Comparison) -> list[Finding]:
    """Outputs in float32, and the choice of experts."""
    what, fine = it.subject.what, it.fine.output
    floor = largest(it.coarse.output - fine)
    reason = f"float32 against transformers' float64, from which its own float32 is {floor:.2e} away"
    found = [Finding(f"{what}, float32", largest(it.ours.output - fine), noise_limit(floor, fine), reason)]
    return found + _routing("routing, float32", it.ours, it.fine)


def _routing(name: str, ours: Run, other: Run) -> list[Finding]:
    """``other`` is the reference in its second precision, told the choices of the first as ours was."""
    if not ours.routing.count:
        return []
    own = other.routing.swaps
    reason = f"of {ours.routing.count} choices of experts are others; transformers' other precision changes {own}"
    return [Finding(name, float(ours.routing.swaps), swap_limit(own), reason)]


def check_bfloat16(it: Comparison) -> list[Finding]:
    """Outputs in bfloat16: their mean distance, which is steady, and the largest one. Tokens whose experts swap under
    rounding are told the reference's choice, and counted."""
    theirs = it.theirs(it.half_reference)
    told = theirs.routing.choices
    wide, ours = it.theirs(it.coarse_reference, told=told), it.run(it.half, told=told)
    off, own = ours.output.double() - theirs.output.double(), theirs.output.double() - wide.output.double()
    mean, floor = float(off.abs().mean()), float(own.abs().mean())
    what = f"{it.subject.what}, bfloat16"
    reason = "bfloat16 against transformers' bfloat16; its own float32 is {:.2e} away"
    rounding = noise_limit(0.0, theirs.output)
    return [
        Finding(f"{what}, mean", mean, _MEAN_FACTOR * floor + rounding, reason.format(floor)),
        Finding(
            f"{what}, largest", largest(off), noise_limit(largest(own), theirs.output), reason.format(largest(own))
        ),
        *_routing("routing, bfloat16", ours, wide),
        *_kept_wide(f"{what}, mean", it),
    ]


def _kept_wide(name: str, it: Comparison) -> list[Finding]:
    """Tensors that only one of the two keeps in float32: with all of them wide, nothing would round as it should.

    Of a whole model; a block of the reference is brought to one dtype.
    """
    if it.subject.layer is not None:
        return []
    theirs = it.half_reference.state_dict()
    wide = {stored: theirs[held].dtype == torch.float32 for stored, held in it.in_memory.items()}
    pieces = {(piece.theirs, piece.float32) for piece in it.subject.spec.pieces}
    reason = "is float32 whatever the rest is {}"
    return [
        Finding(name, float("inf"), 0.0, reason.format("here alone" if float32 else "in transformers alone"), stored)
        for stored, float32 in sorted(pieces)
        if wide.get(stored, float32) != float32
    ]


def check_norms(it: Comparison) -> list[Finding]:
    """Each norm by itself in bfloat16, on what the reference's norm was given: it must round in the same places, a
    difference that drowns in the outputs."""
    theirs, ours = dict(it.half_reference.named_modules()), dict(it.half.named_modules())
    pairs = {}
    for piece in it.subject.spec.pieces:
        name, _, kind = piece.ours.rpartition(".")
        other = it.in_memory.get(piece.theirs, "").rpartition(".")[0]
        if kind == "weight" and isinstance(ours.get(name), RMSNorm) and other in theirs:
            pairs[name] = (ours[name], theirs[other])
    given: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...]) -> None:
        if len(args) == 1:  # a norm with a gate (Qwen3-Next's) does more than ours
            given.setdefault(name, args[0].detach())

    handles = [
        other.register_forward_pre_hook(lambda _module, args, name=name: keep(name, args))
        for name, (_, other) in pairs.items()
    ]
    try:
        it.theirs(it.half_reference, documents=1)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, (own, other) in pairs.items():
        if name not in given:
            continue
        off, floor = _norm_distance(own, other, given[name])
        reason = "mean distance of bfloat16 outputs for one input, which bfloat16 moves by {:.2e}"
        found.append(
            Finding("norms, bfloat16", off, _SAME_ROUNDING * floor, reason.format(floor), it.subject.named(name))
        )
    return found


def _norm_distance(own: nn.Module, other: nn.Module, hidden: Tensor) -> tuple[float, float]:
    """(ours from transformers', transformers' bfloat16 from its float32), mean distances."""
    with torch.no_grad():
        theirs = other(hidden)
        wide = copy.deepcopy(other).float()(hidden.float())
        return float((own(hidden).float() - theirs.float()).abs().mean()), float((theirs.float() - wide).abs().mean())


def check_far_positions(it: Comparison) -> list[Finding]:
    """Outputs of tokens that stand far apart, up to far beyond the training length: it is distance that a rotary
    embedding sees, a shift of all positions it does not."""
    if not it.subject.spec.config.ropes:
        return []
    end = _FAR * it.subject.spec.config.max_position_embeddings
    stride = max(2, end // max(it.subject.lengths))
    coarse = it.theirs(it.coarse_reference, stride=stride)
    told = coarse.routing.choices
    fine = it.theirs(it.fine_reference, stride=stride, told=told).output
    ours = it.run(it.subject.model, stride=stride, told=told).output
    floor = largest(coarse.output - fine)
    reason = f"positions up to {end:,}, {stride:,} apart, float32; transformers' own is {floor:.2e} from its float64"
    return [Finding("far positions", largest(ours - fine), noise_limit(floor, fine), reason)]


def check_packed(it: Comparison) -> list[Finding]:
    """Documents in one row compute what each computes by itself."""
    subject, choices = it.subject, it.coarse.routing.choices
    parts, begin = [], 0
    for length in subject.lengths:
        rows = slice(begin, begin + length)
        told = {layer: (ids[rows], weights[rows]) for layer, (ids, weights) in choices.items()}
        with torch.no_grad(), routed(experts_of(subject.model), told):
            parts.append(subject.run(subject.model, subject.inputs[rows], (length,)))
        begin += length
    lengths = ", ".join(map(str, subject.lengths))
    limit = noise_limit(largest(it.coarse.output - it.fine.output), it.fine.output)
    apart = largest(torch.cat(parts) - it.ours.output)
    return [Finding("packed = alone", apart, limit, f"{subject.what} of documents of {lengths} tokens in a row")]


def check_cached(it: Comparison) -> list[Finding]:
    """Generation with a cache: a prefill, then single tokens of all sequences at once, against the full forward."""
    subject, choices = it.subject, it.coarse.routing.choices
    starts = list(itertools.accumulate(subject.lengths, initial=0))
    chosen = [
        number
        for number, length in enumerate(subject.lengths)
        # On the way across longrope's bound a shorter document is another one than the beginning of the longer.
        if length > _STEPS and not subject.spec.config.changes_rope(length - _STEPS, length)
    ]
    if not chosen:
        return []
    ends = [subject.lengths[number] for number in chosen]
    rows = [list(range(starts[number], starts[number] + subject.lengths[number])) for number in chosen]
    cache = KeyValueCache(len(chosen), max(ends))
    groups = [[row[: len(row) - _STEPS] for row in rows]]
    groups += [[[row[len(row) - _STEPS + step]] for row in rows] for step in range(_STEPS)]
    outputs, places = [], []
    for group in groups:
        place = torch.tensor([index for part in group for index in part])
        told = {layer: (ids[place], weights[place]) for layer, (ids, weights) in choices.items()}
        counts = tuple(len(part) for part in group)
        with torch.no_grad(), routed(experts_of(subject.model), told):
            outputs.append(subject.run(subject.model, subject.inputs[place], counts, cache=cache))
        cache.advance(counts)
        places.append(place)
    apart = largest(torch.cat(outputs) - it.ours.output[torch.cat(places)])
    limit = noise_limit(largest(it.coarse.output - it.fine.output), it.fine.output)
    reason = f"{subject.what}: prefill and {_STEPS} single steps of {len(chosen)} sequences, float32"
    return [Finding("cached = uncached", apart, limit, reason)]


def check_lora(it: Comparison) -> list[Finding]:
    """A fresh adapter everywhere changes no bit of the outputs."""
    from posttrain_lib.models.lora import GROUPS, LoraSettings, apply_lora

    subject = it.subject
    present = parameters(subject, subject.model)
    targets = tuple(group for group, pattern in GROUPS.items() if any(_adaptable(pattern, name) for name in present))
    if not targets:
        return []
    adapted = apply_lora(copy.deepcopy(subject.model), LoraSettings(rank=2, alpha=4.0, targets=targets))
    changed = int((it.run(adapted, told=it.coarse.routing.choices).output != it.ours.output).sum())
    reason = f"{subject.what} of {it.ours.output.numel()} that differ with fresh adapters on {', '.join(targets)}"
    return [Finding("LoRA at init = base", float(changed), 0.0, reason)]


def _adaptable(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name.removesuffix(".weight")) is not None


#: in order; what compares ranks with one process is added here
CHECKS: tuple[CheckFunction, ...] = (
    check_float32,
    check_bfloat16,
    check_norms,
    check_gradients,
    check_packed,
    check_packed_gradients,
    check_far_positions,
    check_cached,
    check_lora,
)
