"""Adapters in the definitions: fresh, trained, merged, in low precision, of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import (
    EMBEDDING,
    LoraDecoder,
    LoraLinear,
    LoraSettings,
    apply_lora,
    init_adapters,
    known_targets,
    merged_state_dict,
)
from posttrain_lib.optim import parameter_groups
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.lora_cases import LENGTH, TOKENS, everything_of, logits_of, scramble
from tests.support.tiny_models import CASES, write_tiny_model

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("tiny")

    def written(case: str) -> Path:
        path = root / case.replace(", ", "-").replace(" ", "-")
        return path if path.is_dir() else write_tiny_model(case, path)

    return written


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype)
    load_hf_weights(model, spec, folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_changes_no_bit(folder: Folder, case: str) -> None:
    base, adapted = loaded(folder(case)), loaded(folder(case))
    settings = everything_of(adapted)
    assert apply_lora(adapted, settings) is adapted
    assert torch.equal(logits_of(adapted), logits_of(base))
    assert {name for name, parameter in adapted.named_parameters() if "lora_" not in name} == {
        name for name, _ in base.named_parameters()
    }


@pytest.mark.parametrize("case", ["llama", "qwen2", "glm4", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_dora_changes_no_bit(folder: Folder, case: str, dtype: torch.dtype) -> None:
    """With biases as well, and where the product of bias and magnitude would round."""
    base, adapted = loaded(folder(case), dtype), loaded(folder(case), dtype)
    apply_lora(adapted, LoraSettings(3, 5.0, ("attention", "mlp"), dora=True))
    assert torch.equal(logits_of(adapted), logits_of(base))


@pytest.mark.parametrize(
    ("case", "dora", "rslora"),
    [*((case, False, False) for case in CASES), ("glm4", True, False), ("llama", False, True)],
)
def test_merged_weights_compute_the_same_and_gradients_follow(
    folder: Folder, case: str, dora: bool, rslora: bool
) -> None:
    """The gradient of ``up`` and ``down`` is that of the merged weight, times the other factor and the scale."""
    base = loaded(folder(case)).double()
    adapted = apply_lora(base, replace(everything_of(base, dora=dora), rslora=rslora)).double()
    scramble(adapted)
    merged = loaded(folder(case)).double()
    before = logits_of(merged)
    merged.load_state_dict(merged_state_dict(adapted))
    found, expected = logits_of(adapted), logits_of(merged)
    # float64, but for what the definitions round to float32 wherever they run: frequencies, gates of linear attention
    assert_near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    assert_near(found, expected)
    assert (found - before).abs().max() > 0.1
    for model in (adapted, merged):
        (logits_of(model) * torch.linspace(-1, 1, LENGTH, dtype=torch.float64)[:, None]).sin().sum().backward()
    own, whole = dict(adapted.named_parameters()), dict(merged.named_parameters())
    for name, weight in whole.items():
        if name not in adapted.adapters:
            continue
        kind = adapted.adapters[name]
        if kind.dora:
            continue  # its lengths are held constant: not the gradient of the merged weight
        assert weight.grad is not None and own[name].grad is None
        grad = weight.grad.t() if name == EMBEDDING else weight.grad
        down, up = (own[kind.part(part)] for part in ("down", "up"))
        assert_near(up.grad, kind.scale * grad @ down.transpose(-1, -2))
        assert_near(down.grad, kind.scale * up.transpose(-1, -2) @ grad)


def test_dora_by_its_formula() -> None:
    """A projection against the paper's formula, with the length held constant in the gradient."""
    torch.manual_seed(3)
    base = torch.nn.Linear(6, 5).double()
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    adapted: LoraLinear = base  # type: ignore[assignment]
    adapted.__class__ = LoraLinear
    adapted.lora_scale = 0.7
    for name, shape in (("lora_down", (2, 6)), ("lora_up", (5, 2)), ("lora_magnitude", (5,))):
        setattr(adapted, name, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)))
    hidden = torch.randn(4, 6, dtype=torch.float64)
    down, up, magnitude = (
        getattr(adapted, name).detach().clone().requires_grad_() for name in ("lora_down", "lora_up", "lora_magnitude")
    )
    changed = weight + 0.7 * up @ down
    expected = hidden @ (magnitude / changed.detach().norm(dim=1))[:, None].mul(changed).t() + bias
    found = adapted(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64 sums of six terms
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, reference in (("lora_down", down), ("lora_up", up), ("lora_magnitude", magnitude)):
        torch.testing.assert_close(getattr(adapted, name).grad, reference.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("case", "targets", "expected"),
    [
        ("llama", ("q_proj",), {f"layers.{n}.attention.q_proj.weight" for n in range(4)}),
        ("llama", ("layers.2.attention.q_proj",), {"layers.2.attention.q_proj.weight"}),
        ("llama, tied", ("head",), {EMBEDDING}),
        ("llama", ("head", "embedding"), {EMBEDDING, "lm_head.weight"}),
        ("mixtral", ("experts.down_proj",), {f"layers.{n}.mlp.experts.down_proj" for n in range(4)}),
        ("qwen3_next", ("shared.up_proj", "in_proj_ba"), {
            *(f"layers.{n}.mlp.shared.up_proj.weight" for n in (1, 3)),
            *(f"layers.{n}.attention.in_proj_ba.weight" for n in (0, 1, 2)),
        }),
    ],
)  # fmt: skip
def test_targets_by_group_and_by_name(folder: Folder, case: str, targets: tuple[str, ...], expected: set[str]) -> None:
    assert set(apply_lora(loaded(folder(case)), LoraSettings(2, 4.0, targets)).adapters) == expected


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("llama", LoraSettings(2, 4.0, ("atention",)), r"did you mean 'attention'\?"),
        ("llama", LoraSettings(2, 4.0, ("attention", "q_prog")), r"did you mean 'q_proj'\?"),
        ("llama", LoraSettings(2, 4.0, ("experts",)), "LoRA targets something that the model does not have"),
        ("mixtral", LoraSettings(2, 4.0, ("mlp",)), "expected: +attention, experts, head, embedding"),
        ("llama", LoraSettings(0, 4.0), "rank of an adapter is at least 1"),
        ("mixtral", LoraSettings(2, 4.0, ("experts",), dora=True), "DoRA is for the projections"),
        ("llama", LoraSettings(2, 4.0, ("head",), dora=True), "DoRA is for the projections"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder: Folder, case: str, settings: LoraSettings, message: str) -> None:
    model = loaded(folder(case))
    with pytest.raises(ModelError, match=message):
        apply_lora(model, settings)
    assert all(parameter.requires_grad for parameter in model.parameters()), "a refusal leaves the model as it was"


def test_adapters_are_not_added_twice(folder: Folder) -> None:
    model = apply_lora(loaded(folder("llama")), LoraSettings(2, 4.0))
    with pytest.raises(ModelError, match="has adapters already"):
        apply_lora(model, LoraSettings(2, 4.0))


def adapters_of(model: LoraDecoder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def test_values_depend_on_seed_and_name_alone(folder: Folder) -> None:
    some = adapters_of(apply_lora(loaded(folder("mixtral")), LoraSettings(2, 4.0, ("q_proj", "embedding"), seed=5)))
    more = adapters_of(apply_lora(loaded(folder("mixtral")), LoraSettings(2, 4.0, tuple(known()), seed=5)))
    other = adapters_of(apply_lora(loaded(folder("mixtral")), LoraSettings(2, 4.0, ("q_proj",), seed=6)))
    assert all(torch.equal(more[name], value) for name, value in some.items())
    down = "layers.0.attention.q_proj.lora_down"
    assert not torch.equal(some[down], other[down])
    assert not torch.equal(some[down], some[down.replace("0", "1")])
    # PEFT's: uniform within 1 / sqrt(inputs), up zero; the embedding's down zero, up normal
    assert some[down].abs().max() <= 32**-0.5 and some[down].std() == pytest.approx((32 * 3) ** -0.5, rel=0.3)
    assert not some["layers.0.attention.q_proj.lora_up"].any() and not some["embed_tokens.lora_down"].any()
    assert some["embed_tokens.lora_up"].std() == pytest.approx(1.0, rel=0.3)  # 64 draws


def known() -> list[str]:
    return ["attention", "experts", "head", "embedding"]


def test_a_model_without_memory_gets_the_same_values_later(folder: Folder) -> None:
    settings = LoraSettings(2, 4.0, ("attention", "mlp"), dora=True, seed=2)
    direct = apply_lora(loaded(folder("qwen3")), settings)
    spec = spec_from_folder(folder("qwen3"))
    later = apply_lora(build_model(spec, device="meta"), settings)
    assert all(parameter.is_meta for parameter in later.parameters())
    later.to_empty(device="cpu")
    load_hf_weights(later, spec, folder("qwen3"))
    init_adapters(later, settings.seed)
    state = later.state_dict()
    assert all(torch.equal(state[name], value) for name, value in direct.state_dict().items())
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize("case", ["qwen3", "phi3", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_frozen_in_bfloat16_trains(folder: Folder, case: str, autocast: bool) -> None:
    model = loaded(folder(case), torch.bfloat16)
    targets = tuple(target for target in known_targets(model) if target in known())
    apply_lora(model, LoraSettings(4, 8.0, targets))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    base = {name: value for name, value in before.items() if "lora_" not in name}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    stored = sum(value.untyped_storage().nbytes() for name, value in model.named_parameters() if name in base)
    assert stored == 2 * sum(value.numel() for value in base.values())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = logits_of(model)
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), TOKENS[1:])
        loss.backward()
        losses.append(loss.item())
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert set(gradients) == set(before) - set(base)
        assert all(value.dtype == torch.float32 for value in gradients.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1.0, losses
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    # A logit of order 1 in bfloat16 has steps of 2^-8; four layers of them, and rounding the merged weights, make
    # differences of a few steps. Without the adapters the loss is apart by more than 1 (above).
    merged = build_model(spec_from_folder(folder(case)), torch.bfloat16)
    merged.load_state_dict(merged_state_dict(model))
    apart = torch.nn.functional.cross_entropy(logits_of(merged)[:-1].float(), TOKENS[1:]).item() - losses[-1]
    assert abs(apart) < 0.5


def test_recomputation_keeps_the_gradients(folder: Folder) -> None:
    gradients = []
    for recomputed in (False, True):
        model = apply_lora(loaded(folder("qwen3")), LoraSettings(4, 8.0, ("attention", "mlp", "head")))
        scramble(model)
        mode = "full" if recomputed else "none"
        apply_parallelism(model, mesh=rank_mesh(MeshSpec(), torch.device("cpu")), activation_checkpointing=mode)
        logits_of(model).square().mean().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * (7 * 4 + 1)
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())


def test_merging_rounds_once(folder: Folder) -> None:
    model = apply_lora(loaded(folder("llama"), torch.bfloat16), LoraSettings(4, 8.0))
    scramble(model)
    name = "layers.1.mlp.up_proj"
    own = dict(model.named_parameters())
    expected = own[f"{name}.weight"].float() + 2.0 * own[f"{name}.lora_up"] @ own[f"{name}.lora_down"]
    merged = merged_state_dict(model)
    assert torch.equal(merged[f"{name}.weight"], expected.bfloat16())
    assert set(merged) == {name for name in own if "lora_" not in name}
