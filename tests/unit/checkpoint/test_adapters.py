"""Adapters in PEFT's format: the same numbers in PEFT's own forward, files that come back, refusals by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_lib.adapters.hf_reference import load_reference
from posttrain_lib.checkpoint.adapters import ADAPTER_FILE, CONFIG_FILE, load_adapter, save_adapter
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraDecoder, LoraSettings, apply_lora
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from tests.support.lora_cases import TOKENS, everything_of, logits_of, scramble
from tests.support.tiny_models import CASES, write_tiny_model

peft = pytest.importorskip("peft", reason="the proof is PEFT's own forward")

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("tiny")

    def written(case: str) -> Path:
        path = root / case.replace(", ", "-").replace(" ", "-")
        return path if path.is_dir() else write_tiny_model(case, path)

    return written


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT warns of embeddings that it writes, and of patterns for parameters that it looks for among modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(folder: Path) -> tuple[Decoder, ModelSpec]:
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model.double(), spec


def reference_logits(model: Any) -> tuple[Tensor, float]:
    """(float64 logits, what rounding to float32 does to them): transformers' norms and softmax are float32 even in a
    float64 model, so that its float64 is better than its float32, but not exact."""
    with torch.no_grad():
        exact, rounded = (
            model.to(dtype).eval()(input_ids=TOKENS[None], use_cache=False).logits[0].double()
            for dtype in (torch.float64, torch.float32)
        )
    return exact, float((exact - rounded).abs().max())


def saved(model: LoraDecoder, spec: ModelSpec, out: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    remarks = save_adapter(model, spec, out, "base")
    return json.loads((out / CONFIG_FILE).read_text()), load_file(out / ADAPTER_FILE), remarks


def in_float32(model: LoraDecoder) -> LoraDecoder:
    """Adapters are float32 in a file; their numbers are, so that none is lost."""
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()
    return model


#: where PEFT cannot take dense feed-forwards beside experts (see the remark that saving gives), the rest
_TAKEN = ("attention", "experts", "head", "embedding")
_PART = {"qwen3_moe": _TAKEN, "deepseek_v3": _TAKEN, "deepseek_v3, plain query": _TAKEN, "qwen3_next": _TAKEN}
CHANGES: list[tuple[str, tuple[str, ...], dict[str, bool]]] = [
    *((case, _PART.get(case, ()), {}) for case in CASES),
    ("phi3", ("attention", "mlp"), {"rslora": True}),
    ("qwen3_moe", ("attention", "experts"), {"rslora": True}),
    ("gpt_oss", ("attention", "experts"), {"rslora": True}),
    ("llama", ("attention", "mlp"), {"dora": True}),
    ("glm4", ("attention", "mlp"), {"dora": True, "rslora": True}),
    ("phi3", ("q_proj", "up_proj"), {"dora": True}),
    ("phi3", ("q_proj", "up_proj", "layers.1.attention.o_proj"), {}),
    ("gpt_oss", ("experts.gate_proj",), {}),
    ("mixtral", ("experts.down_proj", "v_proj"), {}),
    ("qwen3", ("layers.1.attention.q_proj", "layers.3.mlp.up_proj"), {}),
]


@pytest.mark.parametrize(("case", "targets", "changes"), CHANGES)
def test_peft_computes_the_same_and_the_file_comes_back(
    folder: Folder, tmp_path: Path, case: str, targets: tuple[str, ...], changes: dict[str, bool]
) -> None:
    model, spec = loaded(folder(case))
    before = logits_of(model)
    settings = everything_of(model) if not targets else LoraSettings(4, 8.0, targets)
    dora, rslora = changes.get("dora", False), changes.get("rslora", False)
    adapted = apply_lora(model, replace(settings, dora=dora, rslora=rslora))
    scramble(in_float32(adapted))
    config, tensors, remarks = saved(adapted, spec, tmp_path)
    assert remarks == (["vLLM does not serve DoRA: give it the merged weights"] if dora else [])
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    ours = logits_of(adapted.double())
    theirs, noise = reference_logits(
        peft.PeftModel.from_pretrained(load_reference(folder(case), dtype=torch.float64), tmp_path)
    )
    assert (ours - before).abs().max() > 1000 * noise
    assert (ours - theirs).abs().max() < 2 * noise

    back = load_adapter(loaded(folder(case))[0], spec, tmp_path)
    assert all(value.dtype == torch.float32 for name, value in back.named_parameters() if "lora_" in name)
    # The block form in float64: the same products in another order. With DoRA the file has, in float32, the lengths of
    # the rows beside the adapted ones.
    near = 1e-5 if dora else 1e-11
    torch.testing.assert_close(logits_of(back.double()), ours, rtol=near, atol=near)
    if not dora:  # a stored tensor that is adapted in part keeps a magnitude for the rest
        assert {name: (a.rank, a.scale) for name, a in back.adapters.items()} == {
            name: (a.rank, pytest.approx(a.scale, rel=1e-15)) for name, a in adapted.adapters.items()
        }
    in_float32(back)
    again, same, _ = saved(back, spec, tmp_path / "again")
    if not dora:
        assert again == config and same.keys() == tensors.keys()
        assert all(torch.equal(same[name], value) for name, value in tensors.items())


_EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
_PATTERNS = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"target_modules": "all-linear"}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True}),
    ("phi3", {"target_modules": ["qkv_proj", "o_proj"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("llama, tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ("granite", {"target_modules": ["q_proj", "v_proj"], **_PATTERNS}),
    ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    ("qwen3_moe", {"target_modules": ["o_proj"], **_EXPERTS}),
    ("deepseek_v3", {"target_modules": ["kv_b_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ("olmoe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    ("gpt_oss", {"target_modules": ["q_proj"], **_EXPERTS}),
    ("qwen3_next", {"target_modules": ["in_proj_qkvz", "out_proj", "q_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "options"), THEIRS)
def test_an_adapter_that_peft_made(folder: Folder, tmp_path: Path, case: str, options: dict[str, Any]) -> None:
    theirs = peft.get_peft_model(
        load_reference(folder(case), dtype=torch.float64), peft.LoraConfig(r=4, lora_alpha=8, **options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path)
    base, spec = loaded(folder(case))
    before = logits_of(base)
    ours = load_adapter(base, spec, tmp_path)
    found = logits_of(ours.double())
    expected, noise = reference_logits(theirs)
    assert (found - before).abs().max() > 1000 * noise
    assert (found - expected).abs().max() < 2 * noise


def test_projections_that_share_their_input_factor_keep_sharing_it_in_the_file(folder: Folder, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        load_reference(folder("phi3"), dtype=torch.float32), peft.LoraConfig(r=4, target_modules=["qkv_proj"])
    )
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    theirs.save_pretrained(tmp_path)
    base, spec = loaded(folder("phi3"))
    ours = load_adapter(base, spec, tmp_path)
    config, tensors, _ = saved(in_float32(ours), spec, tmp_path / "again")
    expected = load_file(tmp_path / ADAPTER_FILE)
    assert config["r"] == 4 and config["rank_pattern"] == {}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_the_block_form_of_joined_projections(folder: Folder, tmp_path: Path) -> None:
    model, spec = loaded(folder("phi3"))
    adapted = apply_lora(model, LoraSettings(4, 6.0, ("attention",), rslora=True))
    scramble(in_float32(adapted))
    config, tensors, _ = saved(adapted, spec, tmp_path)
    # the whole's rank is the highest, so that a server's own limit sees it; alpha / sqrt(rank) stays 3
    assert config["r"] == 12 and config["lora_alpha"] == pytest.approx(3 * 12**0.5)
    assert config["rank_pattern"] == {"o_proj": 4} and config["alpha_pattern"] == {"o_proj": 6}
    assert config["use_rslora"] and config["target_modules"] == ["qkv_proj", "o_proj"]
    name = "base_model.model.model.layers.2.self_attn.qkv_proj.lora_{}.weight"
    down, up = tensors[name.format("A")], tensors[name.format("B")]
    own = dict(adapted.named_parameters())
    rows = [32, 16, 16]
    for place, projection in enumerate("qkv"):
        here, columns = slice(sum(rows[:place]), sum(rows[: place + 1])), slice(4 * place, 4 * place + 4)
        assert torch.equal(down[columns], own[f"layers.2.attention.{projection}_proj.lora_down"])
        assert torch.equal(up[here, columns], own[f"layers.2.attention.{projection}_proj.lora_up"])
        assert int(up[here].count_nonzero()) == up[here, columns].numel()


def test_experts_under_the_names_of_the_family(folder: Folder, tmp_path: Path) -> None:
    """One module for each expert where the files have one; every projection, for the readers want all three."""
    model, spec = loaded(folder("mixtral"))
    adapted = apply_lora(model, LoraSettings(4, 8.0, ("experts.down_proj",), rslora=True))
    scramble(in_float32(adapted))
    config, tensors, _ = saved(adapted, spec, tmp_path)
    own = dict(adapted.named_parameters())
    name = "base_model.model.model.layers.3.block_sparse_moe.experts.5.{}.lora_{}.weight"
    assert torch.equal(tensors[name.format("w2", "B")], own["layers.3.mlp.experts.down_proj_lora_up"][5])
    assert not tensors[name.format("w1", "A")].any() and not tensors[name.format("w3", "B")].any()
    # PEFT doubles rank and alpha as it joins w1 and w3, which keeps alpha / rank but not alpha / sqrt(rank)
    assert not config["use_rslora"] and config["lora_alpha"] == 16
    assert config["target_modules"] == ["w1", "w3", "w2"] and len(tensors) == 4 * 6 * 3 * 2


@pytest.mark.parametrize(
    ("case", "settings", "remark"),
    [
        ("qwen3_next", LoraSettings(2, 2.0, ("mlp", "experts")), "leaves 12 modules out"),
        ("deepseek_v3", LoraSettings(2, 2.0, ("layers.0.mlp.up_proj",)), "leaves 1 modules out"),
    ],
)
def test_what_a_reader_cannot_take_is_said(
    folder: Folder, tmp_path: Path, case: str, settings: LoraSettings, remark: str
) -> None:
    model, spec = loaded(folder(case))
    [found] = save_adapter(apply_lora(model, settings), spec, tmp_path)
    assert remark in found and "give it the merged weights" in found


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / ADAPTER_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in tensors.items()}


def _without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if part not in name}


def _cut(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value[:-1].contiguous() if part in name else value for name, value in tensors.items()}


Damage = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "modules to save": (lambda c, t: ({**c, "modules_to_save": ["lm_head"]}, t), "modules_to_save"),
    "another method": (lambda c, t: ({**c, "peft_type": "IA3"}, t), "peft_type"),
    "bias": (lambda c, t: ({**c, "bias": "lora_only"}, t), "setting of PEFT that is not supported"),
    "a changed base": (lambda c, t: ({**c, "init_lora_weights": "pissa_niter_4"}, t), "init_lora_weights"),
    "no rank": (lambda c, t: ({"peft_type": "LORA"}, t), "configuration cannot be read"),
    "unknown module": (lambda c, t: (c, _rename(t, "o_proj", "out_proj")), "module that this model does not have"),
    "unknown tensor": (lambda c, t: (c, _rename(t, "lora_A", "lora_C")), "none of LoRA's"),
    "a router": (lambda c, t: (c, _rename(t, "self_attn.o_proj", "block_sparse_moe.gate")), "does not have"),
    "one half": (lambda c, t: (c, _without(t, "o_proj.lora_B")), "one of lora_A and lora_B alone"),
    "another width": (lambda c, t: (c, _cut(t, "o_proj.lora_B")), "does not fit the model's weight"),
    "experts missing": (lambda c, t: (c, _without(t, "experts.4.w2")), "some experts of a layer alone"),
    "half of a tied weight": (lambda c, t: (c, _without(t, "lm_head")), "embedding and head of this model are one"),
    "another base": (
        lambda c, t: (c, {**t, "base_model.model.model.embed_tokens.base_layer.weight": torch.ones(96, 32)}),
        "made for another base model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_belong_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "tied-mixtral"
    if not folder.is_dir():
        write_tiny_model("mixtral", folder, tie_word_embeddings=True)
    model, spec = loaded(folder)
    adapted = apply_lora(model, LoraSettings(2, 4.0, ("o_proj", "experts", "embedding")))
    scramble(in_float32(adapted))
    config, tensors, _ = saved(adapted, spec, tmp_path)
    load_adapter(loaded(folder)[0], spec, tmp_path)
    change, message = DAMAGES[damage]
    write(tmp_path, *change(config, tensors))
    fresh, _ = loaded(folder)
    with pytest.raises(ModelError, match=message):
        load_adapter(fresh, spec, tmp_path)
    assert not isinstance(fresh, LoraDecoder), "a refusal leaves the model as it was"


def test_a_truncated_file_and_a_missing_folder(folder: Folder, tmp_path: Path) -> None:
    model, spec = loaded(folder("llama"))
    with pytest.raises(ModelError, match="configuration cannot be read"):
        load_adapter(model, spec, tmp_path / "nothing")
    adapted = apply_lora(loaded(folder("llama"))[0], LoraSettings(2, 4.0))
    save_adapter(in_float32(adapted), spec, tmp_path)
    content = (tmp_path / ADAPTER_FILE).read_bytes()
    (tmp_path / ADAPTER_FILE).write_bytes(content[:-10])
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_adapter(model, spec, tmp_path)


@pytest.mark.parametrize("case", ["llama", "llama, tied"])
def test_the_vocabulary_s_padding_is_never_in_the_file(folder: Folder, tmp_path: Path, case: str) -> None:
    def padded() -> Decoder:
        model = build_model(spec)
        load_hf_weights(model, spec, folder(case))
        return model.double()

    spec = with_padded_vocabulary(spec_from_folder(folder(case)), 64)
    adapted = apply_lora(padded(), LoraSettings(4, 8.0, ("q_proj", "head", "embedding")))
    scramble(in_float32(adapted))
    _, tensors, _ = saved(adapted, spec, tmp_path)
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    assert 96 in sizes and 128 not in sizes
    found = logits_of(adapted.double())
    assert found.shape[1] == 128 and bool(found[:, 96:].isinf().all())
    theirs, noise = reference_logits(
        peft.PeftModel.from_pretrained(load_reference(folder(case), dtype=torch.float64), tmp_path)
    )
    assert (found[:, :96] - theirs).abs().max() < 2 * noise
    back = load_adapter(padded(), spec, tmp_path)
    assert torch.equal(logits_of(back.double()), found)
    rows = {name: value for name, value in back.named_parameters() if value.shape[0] == 128 and "lora_" in name}
    assert all(not value[96:].any() for value in rows.values())
