"""One comparison's runs: ours and transformers' over the same documents, each made when a check first asks for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.adapters.hf_reference_parts import parameters_of_stored, stored_gradients
from posttrain_lib.checkpoint.hf import pieces_by_parameter
from posttrain_lib.checkpoint.verify_routing import Choices, Routing, routed
from posttrain_lib.checkpoint.verify_subject import Subject, experts_of
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import layer_number


@dataclass(frozen=True)
class Run:
    """What came out [T, X], and which experts were chosen on the way."""

    output: Tensor
    routing: Routing


class Comparison:
    """A subject and its runs.

    The reference's float32 run decides which experts each token goes through; its float64 and ours are told (see
    ``verify_routing``).
    """

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed

    def against(self, model: Decoder) -> Comparison:
        """The same comparison with another model of ours; what the reference computed is kept."""
        other = Comparison(replace(self.subject, model=model), self.seed)
        kept = ("coarse_reference", "fine_reference", "half_reference", "in_memory", "coarse", "fine")
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        return other

    def release(self) -> None:
        """Give up all models and outputs; the comparison is of no further use."""
        self.__dict__.clear()

    @cached_property
    def coarse_reference(self) -> Any:
        """transformers' in float32."""
        return self.subject.reference(torch.float32)

    @cached_property
    def fine_reference(self) -> Any:
        """The same in float64, which its softmax and norms are not: exact to some 1e-7 of each."""
        return copy.deepcopy(self.coarse_reference).double()

    @cached_property
    def in_memory(self) -> dict[str, str]:
        """Stored name -> name of the parameter of the reference that it goes into."""
        return parameters_of_stored(self.coarse_reference, {piece.theirs for piece in self.subject.spec.pieces})

    @cached_property
    def coarse(self) -> Run:
        """transformers' float32."""
        return self.theirs(self.coarse_reference)

    @cached_property
    def fine(self) -> Run:
        """transformers' float64."""
        return self.theirs(self.fine_reference, told=self.coarse.routing.choices)

    @cached_property
    def ours(self) -> Run:
        """Ours in float32, packed."""
        return self.run(self.subject.model, told=self.coarse.routing.choices)

    @cached_property
    def half(self) -> Decoder:
        """Ours in bfloat16, save for what stays float32."""
        return in_bfloat16(self.subject.model, self.subject)

    @cached_property
    def half_reference(self) -> Any:
        """transformers' in bfloat16."""
        return self.subject.reference(torch.bfloat16)

    def theirs(self, reference: Any, *, told: Choices | None = None, **options: Any) -> Run:
        """Run transformers'."""
        with torch.no_grad(), routed(self.reference_experts(reference), told) as routing:
            return Run(self.subject.run_reference(reference, **options), routing)

    def run(self, model: Decoder, *, told: Choices | None = None, **options: Any) -> Run:
        """Run ours, packed."""
        subject = self.subject
        with torch.no_grad(), routed(experts_of(model), told) as routing:
            return Run(subject.run(model, subject.inputs, subject.lengths, **options), routing)

    def reference_experts(self, reference: Any) -> list[tuple[int, nn.Module]]:
        """(layer, its experts) of transformers': the module that has the tensors of ours."""
        modules, found = dict(reference.named_modules()), {}
        for piece in self.subject.spec.pieces:
            layer = layer_number(piece.ours)
            if layer is not None and ".mlp.experts." in piece.ours and piece.theirs in self.in_memory:
                name = self.in_memory[piece.theirs].rpartition(".")[0]
                found[layer] = modules[name]
        return list(found.items())

    def our_gradients(self, pull: Tensor) -> dict[str, Tensor | None]:
        """Our parameter name -> gradient of ``(output * pull).sum()``, of those that are trained."""
        subject, model = self.subject, self.subject.model
        trained = {name: value for name, value in parameters(subject, model).items() if value.requires_grad}
        with routed(experts_of(model), self.coarse.routing.choices):
            output = subject.run(model, subject.inputs, subject.lengths)
        found = torch.autograd.grad((output * pull.to(output.dtype)).sum(), list(trained.values()), allow_unused=True)
        return dict(zip(trained, found, strict=True))

    def reference_gradients(self, reference: Any, pull: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """(our parameter name -> the same gradient by transformers, where it has one; the stored tensors that it has
        gradients of and that no parameter of ours is)."""
        subject = self.subject
        reference.zero_grad(set_to_none=True)
        with routed(self.reference_experts(reference), self.coarse.routing.choices):
            output = subject.run_reference(reference)
        (output * pull.to(output.dtype)).sum().backward()
        stored = stored_gradients(reference)
        reference.zero_grad(set_to_none=True)
        found, shapes = {}, subject.spec.parameter_shapes()
        for name, pieces in pieces_by_parameter(subject.spec).items():
            if any(piece.theirs not in stored for piece in pieces):
                continue
            value = torch.empty(shapes[name], dtype=output.dtype)
            for piece in pieces:
                part = stored[piece.theirs][piece.their_index]
                value[piece.our_index] = part.transpose(-1, -2) if piece.transposed else part
            found[name] = value
        return found, sorted(set(stored) - {piece.theirs for piece in subject.spec.pieces})


def parameters(subject: Subject, model: Decoder) -> dict[str, nn.Parameter]:
    """Those that the subject runs: of a block, its own."""
    return {
        name: value for name, value in model.named_parameters() if subject.layer is None or name.startswith("layers.0.")
    }


def in_bfloat16(model: Decoder, subject: Subject) -> Decoder:
    """A copy in bfloat16, but for the parameters whose stored tensors are float32 whatever the rest is."""
    wide = {piece.ours for piece in subject.spec.pieces if piece.float32}
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if name not in wide:
            parameter.data = parameter.data.to(torch.bfloat16)
    return half
