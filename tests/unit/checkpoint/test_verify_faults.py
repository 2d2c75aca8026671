"""The gate against seeded faults: each is caught by the check that is named, and the module where it sits is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint import verify_checks
from posttrain_lib.checkpoint.verify import verify_blocks
from posttrain_lib.checkpoint.verify_blocks import FolderWeights, build_part
from posttrain_lib.checkpoint.verify_comparison import Comparison
from posttrain_lib.checkpoint.verify_documents import Documents
from posttrain_lib.checkpoint.verify_modules import compare_modules
from posttrain_lib.checkpoint.verify_report import merged
from posttrain_lib.checkpoint.verify_subject import Subject, kinds_of
from posttrain_lib.models import attention, linear_attention
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import DecoderConfig, ModelSpec
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.cache import KeyValueCache

LENGTHS = (40, 1, 17)


# ---- ways to make a definition wrong ----


def _decoder(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return lambda config: replace(config, **changes)


def _norm(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return lambda config: replace(config, norm=replace(config.norm, **changes))


def _each(part: str, change: Callable[[Any], dict[str, Any]]) -> Callable[[DecoderConfig], DecoderConfig]:
    """Change ``attention``, ``mlp`` or, with "", the layer itself, where it has the fields in question."""

    def changed(layer: Any) -> Any:
        own = getattr(layer, part) if part else layer
        wanted = change(own)
        if not all(hasattr(own, name) for name in wanted):
            return layer
        return replace(layer, **{part: replace(own, **wanted)}) if part else replace(layer, **wanted)

    return lambda config: replace(config, layers=tuple(changed(layer) for layer in config.layers))


def _attention(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return _each("attention", lambda _: changes)


def _mlp(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return _each("mlp", lambda _: changes)


def _rope(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return _each("attention", lambda own: {"rope": own.rope and replace(own.rope, **changes)})


def _window(change: Callable[[int | None], int | None]) -> Callable[[DecoderConfig], DecoderConfig]:
    return _each("attention", lambda own: {"window": change(own.window)})


def _nope_turned(config: DecoderConfig) -> DecoderConfig:
    (rope,) = config.ropes
    return _attention(rope=rope)(config)


def _nope_shifted(config: DecoderConfig) -> DecoderConfig:
    """The layers without positions are the other ones."""
    (rope,) = config.ropes
    return _each("attention", lambda own: {"rope": rope if own.rope is None else None})(config)


def _windows_shifted(config: DecoderConfig) -> DecoderConfig:
    return replace(config, layers=(*config.layers[1:], config.layers[0]))


# ---- ways to make a loaded model wrong ----


def _at(layer: int, *path: str) -> Callable[[Decoder], Any]:
    def found(model: Decoder) -> Any:
        module: Any = model.layers[layer]
        for name in path:
            module = getattr(module, name)
        return module

    return found


def _set(find: Callable[[Decoder], Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Decoder], None]:
    def apply(model: Decoder) -> None:
        parameter = find(model)
        parameter.data = change(parameter.data).contiguous()

    return apply


def _norms_before(model: Decoder) -> None:
    for layer in model.layers:
        layer.pre_attention_norm, layer.post_attention_norm = layer.post_attention_norm, None


def _norms_swapped(model: Decoder) -> None:
    for layer in model.layers:
        layer.post_attention_norm, layer.pre_mlp_norm = layer.pre_mlp_norm, layer.post_attention_norm


def _gate_and_up(model: Decoder) -> None:
    mlp = model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def _swap_experts(values: torch.Tensor) -> torch.Tensor:
    return values[[1, 0, *range(2, len(values))]]


def _one_off(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values.view(-1)[7] += 0.01
    return values


def _latent_norm_eps(model: Decoder) -> None:
    for layer in model.layers:
        layer.attention.kv_a_norm.eps = 1e-2


def _query_behind_gate(model: Decoder) -> None:
    """Gate and query of each head in the other order."""
    for layer in model.layers:
        if hasattr(layer.attention, "q_proj"):
            right = layer.attention._query
            layer.attention._query = lambda hidden, right=right: right(hidden)[::-1]


def _unchanged(config: DecoderConfig) -> DecoderConfig:
    return config


def _untouched(model: Decoder) -> None:
    """Nothing is wrong with what was loaded."""


@dataclass(frozen=True)
class Fault:
    """``config`` makes ours of a wrong definition, ``model`` changes it after loading. ``check`` must fail, and
    ``module`` be the first wrong one, explained in these ``words``."""

    case: str
    module: str
    words: str
    config: Callable[[DecoderConfig], DecoderConfig] = _unchanged
    model: Callable[[Decoder], None] = _untouched
    check: str = "logits, float32"


FAULTS: dict[str, Fault] = {
    # norms
    "norm eps": Fault("llama", "layers.0.pre_attention_norm", "eps", _norm(eps=1e-3)),
    "norm without 1 +": Fault("gemma2", "layers.0.pre_attention_norm", "1 + weight", _norm(plus_one=False)),
    "norm before, not after": Fault("olmo2", "layers.0.attention.q_proj", "norm before", model=_norms_before),
    "norms in the wrong order": Fault("gemma3", "layers.0.post_attention_norm", "other values", model=_norms_swapped),
    "no qk-norm": Fault("qwen3", "layers.0.attention.q_norm", "only transformers has", _attention(qk_norm=None)),
    "qk-norm after the rotary embedding": Fault(
        "gemma3", "layers.0.attention.q_norm", "norm", _attention(qk_norm_after_rope=True)
    ),
    "eps of the latents' norm": Fault(
        "deepseek_v3", "layers.0.attention.kv_a_norm", "eps", model=_latent_norm_eps
    ),
    # rotary embeddings
    "rope theta": Fault("mistral", "rotary_embedding", "frequency", _rope(theta=10100.0)),
    "rope theta of the sliding layers": Fault("gemma3", "rotary_embedding.0", "frequency", _rope(theta=1000000.0)),
    "rope interleaved": Fault("glm4", "layers.0.attention", "rotary", _rope(interleaved=False)),
    "latent rope not interleaved": Fault("deepseek_v3", "layers.0.attention", "rotary", _rope(interleaved=False)),
    "rope turns all of a head": Fault("phi3", "rotary_embedding", "turn", _rope(dims=8)),
    "yarn factor": Fault("qwen3", "rotary_embedding", "frequency", _rope(factor=7.9)),
    "yarn attention factor": Fault("olmo3", "rotary_embedding", "factor on cosine", _rope(attention_factor=1.0)),
    "yarn ramp truncated": Fault("gpt_oss", "rotary_embedding", "frequency", _rope(truncate=True)),
    "llama3 band": Fault("llama", "rotary_embedding", "frequency", _rope(high_freq_factor=3.0)),
    "NoPE layer given rope": Fault("smollm3", "layers.1.attention", "rotary", _nope_turned),
    "NoPE on the other layers": Fault("smollm3", "layers.0.attention", "rotary", _nope_shifted),
    # attention
    "attention scale": Fault("gemma2", "layers.0.attention", "scale", _attention(scale=0.25)),
    "stretch of the latent's scale": Fault("deepseek_v3", "layers.0.attention", "scale", _attention(scale=20**-0.5)),
    "no soft cap on scores": Fault("gemma2", "layers.0.attention", "soft cap", _attention(softcap=None)),
    "no sinks": Fault("gpt_oss", "layers.0.attention", "sinks exists only in transformers", _attention(sinks=False)),
    "window off by one": Fault("mistral", "layers.0.attention", "mask", _window(lambda width: width and width + 1)),
    "window ignored": Fault("qwen2", "layers.2.attention", "mask", _window(lambda width: None)),
    "window on the other layers": Fault("gpt_oss", "layers.0.attention", "mask", _windows_shifted),
    "no clipping": Fault("olmoe", "layers.0.attention", "scale", _attention(clip=None)),
    "missed bias": Fault("qwen2", "layers.0.attention.q_proj", "q_proj.bias exists", _attention(qkv_bias=False)),
    "gate and query exchanged": Fault("qwen3_next", "layers.3.attention.q_norm", "norm", model=_query_behind_gate),
    # weights
    "transposed weight": Fault(
        "llama", "layers.1.attention.o_proj", "o_proj.weight is transposed",
        model=_set(_at(1, "attention", "o_proj", "weight"), lambda value: value.t()),
    ),
    "gate and up exchanged": Fault("phi3", "layers.1.mlp.gate_proj", "gate_proj.weight has other", model=_gate_and_up),
    "one weight": Fault(
        "glm4", "layers.2.mlp.down_proj", "down_proj.weight has other",
        model=_set(_at(2, "mlp", "down_proj", "weight"), _one_off),
    ),
    "tied head": Fault(
        "qwen3", "lm_head", "lm_head.weight exists only in transformers", _decoder(tie_word_embeddings=True)
    ),
    # scales
    "embedding scale": Fault("gemma2", "embed_tokens", "scale", _decoder(embedding_scale=1.0)),
    "logit scale": Fault("granite", "lm_head", "scale", _decoder(logit_scale=1.0)),
    "no soft cap on logits": Fault("gemma2", "lm_head", "soft cap", _decoder(logit_softcap=None)),
    "residual scale": Fault(
        "granite", "layers.0.after_attention", "residual", _each("", lambda _: {"residual_scale": 0.23})
    ),
    # feed-forward and experts
    "activation": Fault("gemma2", "layers.0.mlp", "activation", _mlp(activation="silu")),
    "experts' activation": Fault("gpt_oss", "layers.0.mlp.experts", "activation", _mlp(activation="silu")),
    "one swapped expert": Fault(
        "mixtral", "layers.2.mlp.experts", "experts 0, 1 in one another's place",
        model=_set(_at(2, "mlp", "experts", "up_proj"), _swap_experts),
    ),
    "router not renormalised": Fault("qwen3_moe", "layers.0.mlp.router", "scale", _mlp(renormalise=False)),
    "router's bias": Fault(
        "gpt_oss", "layers.0.mlp.router", "router.bias has other",
        model=_set(_at(0, "mlp", "router", "bias"), torch.zeros_like),
    ),
    "routed scale": Fault("deepseek_v3", "layers.1.mlp.router", "scale", _mlp(routed_scale=1.0)),
    "no limit by groups": Fault(
        "deepseek_v3", "layers.1.mlp.router", "choice", _mlp(n_group=1, topk_group=1), check="routing, float32"
    ),
    "router's correction": Fault(
        "deepseek_v3", "layers.1.mlp.router", "correction_bias has other",
        model=_set(_at(1, "mlp", "router", "correction_bias"), torch.zeros_like), check="routing, float32",
    ),
    "no gate on the shared expert": Fault(
        "qwen3_next", "layers.1.mlp.shared_gate", "only transformers has", _mlp(shared_gate=False)
    ),
    # linear attention
    "convolution shifted by one": Fault(
        "qwen3_next", "layers.0.attention", "convolution has other",
        model=_set(_at(0, "attention", "convolution"), lambda value: value.roll(1, -1)),
    ),
    "sign of the decay": Fault(
        "qwen3_next", "layers.0.attention", "A_log has other", model=_set(_at(0, "attention", "A_log"), torch.neg)
    ),
    # what float32 does not show
    "early cast": Fault("olmo2", "layers.0.attention.q_norm", "", _norm(late_cast=False), check="norms, bfloat16"),
    "late cast": Fault("llama", "layers.0.pre_attention_norm", "", _norm(late_cast=True), check="norms, bfloat16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def right(family_folder: Callable[[str], Any]) -> Callable[[str], Comparison]:
    """case -> the comparison of the right definition, once per case."""
    made: dict[str, Comparison] = {}

    def comparison(case: str) -> Comparison:
        if case not in made:
            made[case] = _comparison(family_folder(case))
        return made[case]

    return comparison


def _comparison(folder: Any) -> Comparison:
    from posttrain_lib.adapters.hf_reference import load_reference

    spec = spec_from_folder(folder)
    documents = Documents.random(spec, LENGTHS, seed=3)
    weights = FolderWeights(spec, folder)
    subject = Subject(
        spec=spec,
        model=_loaded(spec, weights),
        inputs=documents.token_ids,
        lengths=LENGTHS,
        reference=lambda dtype: load_reference(folder, dtype=dtype),
        stored=weights,
        kinds=kinds_of(spec.config.layers),
    )
    return Comparison(subject, seed=3)


def _loaded(spec: ModelSpec, weights: FolderWeights) -> Decoder:
    """Ours of a spec, with whatever stored weights it has a place for; ones elsewhere."""
    model = build_model(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights(name)
            parameter.copy_(torch.ones_like(parameter) if value is None else value)
    return model


def _against(right: Comparison, fault: Fault) -> Comparison:
    spec = right.subject.spec
    model = _loaded(replace(spec, config=fault.config(spec.config)), right.subject.stored)
    fault.model(model)
    return right.against(model)


CHECKS = {"norms, bfloat16": verify_checks.check_norms}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_its_module_named(name: str, right: Callable[[str], Comparison]) -> None:
    fault = FAULTS[name]
    check = CHECKS.get(fault.check, verify_checks.check_float32)
    assert all(finding.passed for finding in check(right(fault.case)))
    it = _against(right(fault.case), fault)
    found = check(it)
    failed = [finding for finding in found if not finding.passed and finding.name == fault.check]
    assert failed
    if not fault.words:
        assert failed[0].module == fault.module
        return
    modules = compare_modules(it)
    wrong = next(item for item in modules if not item.passed)
    assert wrong.name == fault.module, wrong
    assert wrong.detail is not None
    assert fault.words in wrong.detail


# ---- faults that only some runs show: each check by itself ----


def _failing(check: verify_checks.CheckFunction, it: Comparison) -> list[str]:
    return [f"{finding.name} {finding.module}" for finding in check(it) if not finding.passed]


@pytest.mark.parametrize("case", ["qwen3", "mistral", "gpt_oss", "deepseek_v3"])
def test_a_leak_between_documents_is_caught(
    case: str, right: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = right(case).against(right(case).subject.model)
    packed = attention.packed_attention

    def leaky(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Any, longest: int, **options: Any
    ) -> Any:
        whole = DocumentLayout.of(torch.tensor([0, len(query)], dtype=torch.int32), len(query))
        return packed(query, key, value, whole, len(query), **options)

    monkeypatch.setattr(attention, "packed_attention", leaky)
    assert _failing(verify_checks.check_packed, it)
    assert _failing(verify_checks.check_packed_gradients, it)


@pytest.mark.parametrize("operation", ["short_convolution", "gated_delta_rule"])
def test_a_leak_through_linear_attention_is_caught(
    operation: str, right: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = right("qwen3_next").against(right("qwen3_next").subject.model)
    kept = getattr(linear_attention, operation)

    def leaky(*args: Any, **options: Any) -> Any:
        tokens = len(args[0])
        whole = DocumentLayout.of(torch.tensor([0, tokens], dtype=torch.int32), tokens)
        return kept(*(whole if isinstance(item, DocumentLayout) else item for item in args), **options)

    monkeypatch.setattr(linear_attention, operation, leaky)
    assert _failing(verify_checks.check_packed, it)
    # Each kind of layer is checked; the attention layer does not leak.
    assert {name.split()[-1] for name in _failing(verify_checks.check_packed_gradients, it)} == {"layers.0", "layers.1"}


def test_a_cache_that_forgets_the_window_is_caught(
    right: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = right("mistral").against(right("mistral").subject.model)
    assert not _failing(verify_checks.check_cached, it)
    kept = KeyValueCache.attend
    monkeypatch.setattr(KeyValueCache, "attend", lambda *args, window, **options: kept(*args, window=None, **options))
    assert _failing(verify_checks.check_cached, it)


def test_a_recurrent_state_that_is_not_carried_on_is_caught(
    right: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = right("qwen3_next").against(right("qwen3_next").subject.model)
    assert not _failing(verify_checks.check_cached, it)
    monkeypatch.setattr(KeyValueCache, "state", lambda self, layer: None)
    assert _failing(verify_checks.check_cached, it)


def test_a_frequency_wrong_in_its_last_digits_shows_at_far_positions_only(right: Callable[[str], Comparison]) -> None:
    it = _against(right("mistral"), Fault("mistral", "", ""))
    frequencies = it.subject.model._frequencies[0]
    for _ in range(4):
        frequencies[0] = torch.nextafter(frequencies[0], torch.tensor(9.0))
    assert not _failing(verify_checks.check_float32, it)
    assert _failing(verify_checks.check_far_positions, it)


def test_a_router_that_learns_nothing_is_caught_by_its_gradient(right: Callable[[str], Comparison]) -> None:
    it = _against(right("qwen3_moe"), Fault("qwen3_moe", "", ""))
    for layer in it.subject.model.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda _module, _args, result: (result[0], result[1].detach()))
    assert not _failing(verify_checks.check_float32, it)
    failing = _failing(verify_checks.check_gradients, it)
    assert "gradients layers.0.mlp.router.weight" in failing


def test_a_wrong_backward_is_caught_and_the_parameter_named(right: Callable[[str], Comparison]) -> None:
    it = _against(right("gemma2"), Fault("gemma2", "", ""))
    it.subject.model.layers[3].mlp.down_proj.weight.register_hook(lambda grad: grad * 1.001)
    assert _failing(verify_checks.check_gradients, it) == ["gradients layers.3.mlp.down_proj.weight"]


def test_statistics_in_low_precision_are_caught(right: Callable[[str], Comparison]) -> None:
    it = _against(right("llama"), Fault("llama", "", ""))

    def rounded(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.eps) * module.weight

        return forward

    for half in it.half.layers:
        half.pre_mlp_norm.forward = rounded(half.pre_mlp_norm)
    assert _failing(verify_checks.check_norms, it)[0] == "norms, bfloat16 layers.0.pre_mlp_norm"
    assert not _failing(verify_checks.check_float32, it)


def test_an_adapter_that_starts_with_a_push_is_caught(
    right: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain_lib.models import lora

    it = right("llama").against(right("llama").subject.model)
    assert not _failing(verify_checks.check_lora, it)
    kept = lora.apply_lora

    def pushed(model: Decoder, settings: Any) -> Decoder:
        adapted = kept(model, settings)
        adapted.layers[2].attention.o_proj.lora_up.data[0, 0] = 1e-3
        return adapted

    monkeypatch.setattr(lora, "apply_lora", pushed)
    assert _failing(verify_checks.check_lora, it)


def test_experts_that_swap_under_rounding_are_told_apart_from_a_wrong_router(
    right: Callable[[str], Comparison],
) -> None:
    """Two experts that score alike: noise decides, and only the count of swaps may tell."""
    it = _against(right("qwen3_moe"), Fault("qwen3_moe", "", ""))
    ids, weights = it.coarse.routing.choices[0]
    other = ids.clone()
    other[5] = torch.tensor([expert for expert in range(6) if expert not in ids[5].tolist()][:2])
    told = {**it.coarse.routing.choices, 0: (other, weights)}
    assert it.run(it.subject.model, told=told).routing.swaps >= 1
    assert all(finding.passed for finding in verify_checks.check_float32(it))


def test_findings_are_merged_by_name(right: Callable[[str], Comparison]) -> None:
    it = _against(right("llama"), FAULTS["late cast"])
    (check,) = merged(verify_checks.check_norms(it))
    assert not check.passed
    assert check.reason.startswith("layers.0.pre_attention_norm: ")


#: names of the parts differ (a block has one rotary embedding), or one layer alone cannot be made wrong like this
_NOT_BY_BLOCK = {"NoPE layer given rope", "NoPE on the other layers", "window on the other layers"}
_BY_BLOCK = [
    name
    for name, fault in FAULTS.items()
    if name not in _NOT_BY_BLOCK and fault.config is not _unchanged and not fault.check.startswith("norms")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", _BY_BLOCK)
def test_block_by_block_names_the_same_module(name: str, family_folder: Callable[[str], Any]) -> None:
    fault = FAULTS[name]
    folder = family_folder(fault.case)
    spec = spec_from_folder(folder)

    def build(own: ModelSpec, stored: Callable[[str], torch.Tensor | None]) -> Decoder:
        return build_part(replace(own, config=fault.config(own.config)), stored)

    report = verify_blocks(spec, folder, Documents.random(spec, LENGTHS, seed=3), build=build)
    assert not report.passed
    assert (report.first_wrong_module or "").removesuffix(".0") == fault.module.removesuffix(".0")
