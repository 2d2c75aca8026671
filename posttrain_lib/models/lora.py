"""Low-rank adapters in the definitions, the same for every family.

    weight + scale * up @ down       LoRA (Hu et al. 2021): scale = alpha / rank; rsLoRA (Kalajdzievski 2023):
                                     alpha / sqrt(rank)
    magnitude * that / |that|        DoRA (Liu et al. 2024): the length of each row is trained by itself

An adapted module stays the same object under the same name and becomes the adapted twin of its class, so that every
weight of the base keeps its name. ``X.weight`` is adapted by ``X.lora_down``, ``X.lora_up`` and, with DoRA,
``X.lora_magnitude``; a projection ``X`` of the experts by ``X_lora_down`` and ``X_lora_up``. Adapters are float32
whatever the frozen base is in; the products run in the dtype of the computation. A score head has no adapter: its one
row is trained whole, in float32, beside them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.feed_forward import Experts
from posttrain_lib.models.seeds import named_generator
from posttrain_lib.ops.experts import ExpertAdapter
from posttrain_lib.ops.local import local
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: target -> the weights it means, by their names without ".weight"
GROUPS: dict[str, str] = {
    "attention": r"layers\.\d+\.attention\.\w+",
    "mlp": r"layers\.\d+\.mlp\.(shared\.)?(gate|up|down)_proj",
    "experts": r"layers\.\d+\.mlp\.experts\.\w+",
    "head": r"lm_head",
    "embedding": r"embed_tokens",
}


@dataclass(frozen=True)
class LoraSettings:
    """What a run says of its adapters; anything with these attributes will do.

    ``targets``: keys of :data:`GROUPS`, or names of weights as far from the end as tells them apart ("q_proj",
    "shared.up_proj", "layers.3.attention.o_proj"). Head and embedding of a tied model are one weight: either name
    means it, and its adapter changes both.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attention", "mlp")
    rslora: bool = False
    dora: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Adapted:
    """One weight that has an adapter: our parameter ``name``, and what the adapter is."""

    name: str
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor on ``up @ down``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def module(self) -> str:
        """The name without ".weight"."""
        return self.name.removesuffix(".weight")

    def part(self, kind: str) -> str:
        """The parameter that is the adapter's "down", "up" or "magnitude"."""
        return f"{self.module}{'.' if self.name.endswith('.weight') else '_'}lora_{kind}"

    @property
    def parts(self) -> dict[str, str]:
        """Kind -> parameter, for those that there are."""
        kinds = ("down", "up", "magnitude") if self.dora else ("down", "up")
        return {kind: self.part(kind) for kind in kinds}

    def shapes(self, weight: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Kind -> shape, of a weight [O, I], of the embedding's [V, D], of the experts' [E, O, I]."""
        *experts, outputs, inputs = weight
        if self.name == EMBEDDING:  # a row is looked up, so that it is an input: PEFT's layout
            outputs, inputs = inputs, outputs
        shapes = {"down": (*experts, self.rank, inputs), "up": (*experts, outputs, self.rank)}
        return {**shapes, "magnitude": (outputs,)} if self.dora else shapes


class LoraLinear(nn.Linear):
    """A projection with an adapter: down [R, I], up [O, R], magnitude [O] or None."""

    lora_scale: float
    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., I] -> [..., O]. A fresh adapter leaves the base's output as it is, bit for bit."""
        output = linear(hidden, self.weight, self.bias)
        low = linear(hidden, self.lora_down.to(hidden.dtype))
        added = linear(low, self.lora_up.to(low.dtype))
        if self.lora_magnitude is None:
            return torch.add(output, added, alpha=self.lora_scale)
        # The length's own gradient is left out, as in section 4.3 of the DoRA paper and in PEFT.
        with torch.no_grad():
            lengths = row_lengths(self.weight, self.lora_down, self.lora_up, self.lora_scale)
        ratio = self.lora_magnitude / lengths
        plain = output if self.bias is None else output - self.bias
        return (output + (ratio - 1) * plain + (ratio * self.lora_scale) * added).to(output.dtype)


class LoraEmbedding(nn.Embedding):
    """An embedding with an adapter: down [R, V], up [D, R]."""

    lora_scale: float
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T, D] of int64 [T]."""
        return self.with_adapter(embedding(token_ids, self.weight), embedding(token_ids, self.lora_down.t()))

    def with_adapter(self, output: Tensor, low: Tensor) -> Tensor:
        """Rows [T, D] of the weight and [T, R] of the adapter's down -> [T, D]."""
        low = low.to(output.dtype)
        return torch.add(output, linear(low, local(self.lora_up).to(low.dtype)), alpha=self.lora_scale)


class LoraExperts(Experts):
    """Experts of which some projections have adapters: down [E, R, I], up [E, O, R]."""

    lora_scales: dict[str, float]

    def adapters(self) -> dict[str, ExpertAdapter | None]:
        """Of each projection, None where it has none."""
        return {f"{name}_adapter": self._adapter(f"{name}_proj") for name in ("gate", "up", "down")}

    def _adapter(self, projection: str) -> ExpertAdapter | None:
        if projection not in self.lora_scales:
            return None
        down, up = (getattr(self, f"{projection}_lora_{kind}") for kind in ("down", "up"))
        return ExpertAdapter(down, up, self.lora_scales[projection])


class LoraDecoder(Decoder):
    """A decoder of which some weights have adapters; ``adapters`` lists them by the weights' names."""

    adapters: dict[str, Adapted]

    @property
    def output_head(self) -> OutputHead:
        """The head with its adapter, in the dtype of its weight; a tied one has the embedding's, turned round."""
        head = super().output_head
        dtype = head.weight_VD.dtype
        if isinstance(self.lm_head, LoraLinear):
            own = self.lm_head
            adapter = HeadAdapter(local(own.lora_down).to(dtype), local(own.lora_up).to(dtype), own.lora_scale)
        elif self.config.tie_word_embeddings and isinstance(self.embed_tokens, LoraEmbedding):
            tied = self.embed_tokens
            down, up = local(tied.lora_up).t(), local(tied.lora_down).t()
            adapter = HeadAdapter(down.to(dtype), up.to(dtype), tied.lora_scale)
        else:  # a score head is trained in float32, and computes in the dtype of the body
            return head if self.score is None else replace(head, weight_VD=head.weight_VD.to(self.embed_tokens.weight))
        return replace(head, adapter=adapter)


@contextmanager
def without_adapters(model: LoraDecoder) -> Iterator[None]:
    """A context in which the model is its own frozen base: every adapter counts nothing.

    Raises:
        ModelError: DoRA, whose trained row lengths are no addition to the base.
    """
    if any(adapted.dora for adapted in model.adapters.values()):
        raise ModelError(
            "a model with DoRA cannot be run as its own base",
            where="model.lora.dora",
            expected="false",
            fix="set model.lora.dora: false, or take a reference that stands by itself",
        )
    scales = [
        (module, module.lora_scale) for module in model.modules() if isinstance(module, LoraLinear | LoraEmbedding)
    ]
    experts = [(module, module.lora_scales) for module in model.modules() if isinstance(module, LoraExperts)]
    try:
        for module, _ in scales:
            module.lora_scale = 0.0
        for mixture, kept in experts:
            mixture.lora_scales = dict.fromkeys(kept, 0.0)
        yield
    finally:
        for module, scale in scales:
            module.lora_scale = scale
        for mixture, kept in experts:
            mixture.lora_scales = kept


def apply_lora(model: Decoder, settings: LoraSettings | Any) -> LoraDecoder:
    """Freeze a model and give it the adapters of ``settings``, in place; the same object comes back.

    On a model without memory (device "meta") the adapters have no values yet: shard it, give it memory, load the
    base, and call :func:`init_adapters`. So too where the base is loaded later, for DoRA starts from its weights.

    Raises:
        ModelError: a target that the model does not have (with the nearest that it has), a rank below 1, DoRA of
            something that is no projection, a model that is sharded or has adapters already.
    """
    adapted = adapt(model, planned_adapters(model, settings))
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_adapters(adapted, settings.seed)
    return adapted


def planned_adapters(model: Decoder, settings: LoraSettings | Any) -> list[Adapted]:
    """The weights that ``settings`` means, in the model's order. ModelError as in :func:`apply_lora`."""
    names = adaptable_weights(model)
    chosen: set[str] = set()
    for target in settings.targets:
        found = {name for name in names if _is_meant(name.removesuffix(".weight"), target)}
        if target == "head" and model.config.tie_word_embeddings:
            found = {EMBEDDING}
        if not found:
            known = known_targets(model)
            near = difflib.get_close_matches(target, known, n=1)
            raise ModelError(
                "LoRA targets something that the model does not have",
                where=f"model.lora.targets: {target}",
                got=target,
                expected=f"{', '.join(known)}; or one weight of the layers 0 to {len(model.layers) - 1}, as "
                f"{next(iter(names)).removesuffix('.weight')}",
                fix=f"did you mean {near[0]!r}?" if near else "choose among those",
            )
        chosen |= found
    kind = {name: getattr(settings, name) for name in ("rank", "alpha", "rslora", "dora")}
    return [Adapted(name, **kind) for name in names if name in chosen]


def _is_meant(name: str, target: str) -> bool:
    if target in GROUPS:
        return re.fullmatch(GROUPS[target], name) is not None
    return name == target or name.endswith(f".{target}")


def known_targets(model: Decoder) -> list[str]:
    """What ``targets`` may name of this model: its groups, and the last parts of its weights' names."""
    modules = [name.removesuffix(".weight") for name in adaptable_weights(model)]
    groups = [group for group in GROUPS if any(_is_meant(module, group) for module in modules)]
    if model.config.tie_word_embeddings:
        groups.append("head")
    return [*groups, *dict.fromkeys(module.rpartition(".")[2] for module in modules)]


def adaptable_weights(model: nn.Module) -> list[str]:
    """Names of the weights that can have an adapter: every projection, the experts', embedding and head. Not a score
    head: it is trained itself."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and path != "score":
            names.append(f"{path}.weight")
        elif isinstance(module, Experts):
            names += [f"{path}.{projection}" for projection in _PROJECTIONS]
    return names


def adapt(model: Decoder, plan: Sequence[Adapted]) -> LoraDecoder:
    """Freeze a model and add these adapters, without values (NaN, as ``models.decoder.build_model`` leaves weights).

    Raises:
        ModelError: see :func:`apply_lora`.
    """
    _check(model, plan)
    model.requires_grad_(False)
    if model.score is not None:  # new with the adapters, as PEFT's modules_to_save
        model.score.to(torch.float32).requires_grad_(True)
    parameters = dict(model.named_parameters())
    for adapted in plan:
        weight = parameters[adapted.name]
        path, _, leaf = adapted.name.rpartition(".")
        module: Any = model.get_submodule(path)
        if isinstance(module, Experts):
            module.lora_scales = {**getattr(module, "lora_scales", {}), leaf: adapted.scale}  # type: ignore[assignment]
            module.__class__ = LoraExperts
        else:
            module.__class__ = LoraLinear if isinstance(module, nn.Linear) else LoraEmbedding
            module.lora_scale, module.lora_magnitude = adapted.scale, None
        for kind, shape in adapted.shapes(weight.shape).items():
            values = torch.full(shape, float("nan"), dtype=torch.float32, device=weight.device)
            setattr(module, adapted.part(kind).removeprefix(f"{path}."), nn.Parameter(values))
    model.__class__ = LoraDecoder
    assert isinstance(model, LoraDecoder)
    model.adapters = {adapted.name: adapted for adapted in plan}
    return model


def _check(model: Decoder, plan: Sequence[Adapted]) -> None:
    from torch.distributed.tensor import DTensor

    if isinstance(model, LoraDecoder):
        raise ModelError(
            "the model has adapters already", got=f"{len(model.adapters)} of them", fix="build it anew, or merge them"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ModelError(
            "adapters cannot be added to a sharded model", fix="apply LoRA first, then shard: the adapters are cut too"
        )
    for adapted in plan:
        if adapted.rank < 1:
            raise ModelError("the rank of an adapter is at least 1", where=adapted.name, got=adapted.rank)
        in_block = adapted.name.startswith("layers.") and adapted.name.endswith(".weight")
        if adapted.dora and not in_block:
            raise ModelError(
                "DoRA is for the projections of attention and feed-forward alone",
                where=f"model.lora: {adapted.name}",
                got="dora: true",
                expected="plain LoRA for experts, head and embedding, as in PEFT's experts",
                fix="take them out of model.lora.targets, or turn model.lora.dora off",
            )


def init_adapters(model: LoraDecoder, seed: int) -> None:
    """Fill the adapters so that the model computes what its base does, in place; a sharded one rank by rank.

    As in PEFT: down uniform within 1 / sqrt(inputs) (Kaiming's with a = sqrt(5)) and up zero; of the embedding, down
    zero and up normal. The magnitude is the length of the base's row. Each tensor has a generator of its own, seeded
    by seed and name, so that no order, layout or other target enters.
    """
    from posttrain_lib.checkpoint.hf import local_block

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for adapted in model.adapters.values():
            for kind, name in adapted.parts.items():
                block, begin = local_block(parameters[name])
                if kind == "magnitude":  # rows are cut alike, so that a rank has the weights of its own lengths
                    block.copy_(_lengths_here(parameters[adapted.name]))
                    continue
                whole = _initial(adapted, kind, name, tuple(parameters[name].shape), seed)
                here = tuple(slice(first, first + size) for first, size in zip(begin, block.shape, strict=True))
                block.copy_(whole[here])


def _lengths_here(weight: Tensor) -> Tensor:
    """:func:`row_lengths` of this rank's rows, put together where each is spread over tensor ranks."""
    from torch.distributed.tensor import DTensor

    lengths = row_lengths(local(weight))
    if isinstance(weight, DTensor):
        for axis, placement in enumerate(weight.placements):
            if placement.is_shard(1):
                squares = lengths.square()
                torch.distributed.all_reduce(squares, group=weight.device_mesh.get_group(axis))
                lengths = squares.sqrt()
    return lengths


def _initial(adapted: Adapted, kind: str, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = "up" if adapted.name == EMBEDDING else "down"
    if kind != drawn:
        return torch.zeros(shape)
    values, generator = torch.empty(shape), named_generator(seed, name)
    if adapted.name == EMBEDDING:
        return values.normal_(generator=generator)
    bound = shape[-1] ** -0.5
    return values.uniform_(-bound, bound, generator=generator)


def row_lengths(weight: Tensor, down: Tensor | None = None, up: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Euclidean length of each row of ``weight [O, I] + scale * up @ down``, [O], in float32 at least."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):
        if down is not None and up is not None:
            wide = torch.add(wide, up @ down, alpha=scale)
        return torch.linalg.vector_norm(wide, dim=-1)


def merged_state_dict(model: Decoder) -> dict[str, Tensor]:
    """Every weight of the base by name, whole and on its device, with its adapter in it; every rank calls this.

    Sums are float32 (float64 if the base is) and then rounded to the base's dtype. A model without adapters gives its
    weights. For a base that training froze in bfloat16, merge into the weights as they were stored (:func:`merge`).
    """
    state = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return merge(state, model.adapters.values() if isinstance(model, LoraDecoder) else ())


def merge(state: Mapping[str, Tensor], adapters: Iterable[Adapted]) -> dict[str, Tensor]:
    """Whole weights and adapters by name -> the weights alone, with the adapters in them, in their own dtypes."""
    merged, parts = dict(state), list(adapters)
    for adapted in parts:
        values = {kind: merged.pop(name) for kind, name in adapted.parts.items()}
        weight, down, up = merged[adapted.name], values["down"], values["up"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = down.to(wide), up.to(wide)
        product = (up @ down).t() if adapted.name == EMBEDDING else up @ down
        changed = torch.add(weight.to(wide), product, alpha=adapted.scale)
        if adapted.dora:
            changed *= (values["magnitude"].to(wide) / row_lengths(weight, down, up, adapted.scale))[:, None]
        merged[adapted.name] = changed.to(weight.dtype)
    return merged


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all ranks where it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
