"""What an agent sees of a model: everything that a definition needs, and no name."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.conversion import reference_facts as reference_module
from posttrain_lib.conversion.brief import Brief, Scrubber, folded, make_brief, report_for_agent
from posttrain_lib.conversion.reference_facts import reference_facts
from posttrain_lib.models.families import FAMILIES
from tests.support.tiny_models import CASES

ROOT = Path(__file__).resolve().parents[3]
#: one of each way of naming: with a number, an underscore, a hyphen, a suffix; and one whose name is part of a rope's
NAMED = ["qwen3", "gpt_oss", "gemma3", "llama"]


def brief_of(folder: Path, *, named: bool = False) -> Brief:
    content = json.loads((folder / "config.json").read_text())
    tensors = {name: entry.shape for name, entry in read_headers(folder).items()}
    return make_brief(content, tensors, reference_facts(folder), named=named)


@pytest.mark.parametrize("case", NAMED)
def test_no_name_of_the_family_is_in_it(case: str, family_folder: Callable[[str], Path]) -> None:
    brief = brief_of(family_folder(case))
    text = json.dumps(brief.to_dict()).lower()
    names = {CASES[case]["model_type"], case, re.sub(r"[_-]", "", case)}
    assert not [name for name in names if name in text]
    assert not {"model_type", "architectures", "auto_map", "transformers_version"} & set(brief.config)
    assert "forcausallm" not in text


def test_a_named_agent_is_told(family_folder: Callable[[str], Path]) -> None:
    assert brief_of(family_folder("qwen3"), named=True).names == ("qwen3", "Qwen3ForCausalLM")


def test_facts_say_what_a_field_does_and_what_is_taken_where_it_is_missing(
    family_folder: Callable[[str], Path],
) -> None:
    brief = brief_of(family_folder("smollm3"))
    assert brief.effects["no_rope_layer_interval"].result == "same"
    assert brief.effects["rms_norm_eps"].result == "differs"
    assert brief.effects["attention_bias"].result == "parameters"
    assert "model.layers.{n}.self_attn.o_proj.bias" in brief.effects["attention_bias"].parameters
    assert brief.defaults["num_key_value_heads"] == 4


def test_what_transformers_says_to_a_value_that_it_refuses_is_kept(family_folder: Callable[[str], Path]) -> None:
    brief = brief_of(family_folder("gemma2"))
    refused = {name: effect for name, effect in brief.effects.items() if effect.result == "refused"}
    assert "not a multiple of the number of attention heads" in refused["hidden_size"].said
    assert "`num_hidden_layers` (5) must be equal to" in brief.to_dict()["effects"]["num_hidden_layers"]["said"]
    assert not [name for name, effect in brief.effects.items() if effect.said and name not in refused]
    assert "said" not in brief.to_dict()["effects"]["rms_norm_eps"]


def test_a_refusal_is_scrubbed_of_names() -> None:
    effect = {"change": "1 -> 2", "result": "refused", "parameters": [], "said": "ValueError: Olmo2Config has no 2"}
    content = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "n": 1}
    brief = make_brief(content, {}, {"defaults": {}, "effects": {"n": effect}}, named=False)
    assert brief.effects["n"].said == "ValueError: -Config has no 2"


def test_what_says_nothing_of_a_value_is_no_refusal(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("no memory left")

    folder = family_folder("qwen3")
    content = json.loads((folder / "config.json").read_text())
    known = reference_module._parameters(content)
    monkeypatch.setattr(reference_module, "_logits", out_of_memory)
    with pytest.raises(MemoryError):
        reference_module._effect(folder, content, known, torch.zeros(1))


def test_tensors_of_layers_and_experts_are_one_line_each() -> None:
    found = folded({f"model.layers.{n}.mlp.experts.{e}.w1.weight": (4, 8) for n in (0, 2) for e in range(3)})
    assert found == {"model.layers.{n}.mlp.experts.{e}.w1.weight": {"shape": [4, 8], "layers": [0, 2]}}


def test_reports_lose_folder_and_names() -> None:
    scrubber = Scrubber.of({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, ("/somewhere/olmo2-tiny",))
    report = {
        "family": "olmo2",
        "folder": "/somewhere/olmo2-tiny",
        "passed": False,
        "checks": [{"name": "logits", "reason": "Olmo2Attention in /somewhere/olmo2-tiny/config.json"}],
        "modules": [],
        "first_wrong_module": "norm",
        "detail": None,
    }
    assert "olmo2" not in json.dumps(report_for_agent(report, scrubber)).lower()


def test_the_search_imports_no_family() -> None:
    """It could not read a family's code if it wanted to: the modules are made unfindable, and it works."""
    gone = sorted(reference.partition(":")[0] for reference in FAMILIES.values())
    script = f"""
import sys
sys.modules.update(dict.fromkeys({gone!r}))
from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.search import SearchAgent
config = dict(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu")
inside = {{**{{f"self_attn.{{part}}_proj": (8, 8) for part in "qkvo"}},
          "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
          "input_layernorm": (8,), "post_attention_layernorm": (8,)}}
tensors = {{f"model.layers.0.{{name}}.weight": shape for name, shape in inside.items()}}
tensors |= {{"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,)}}
print(SearchAgent().propose(Brief(config, {{}}, tensors, {{}}), []).text)
loaded = {{name for name, module in sys.modules.items() if module is not None}}
assert not loaded & set({gone!r})
assert "torch" not in loaded and "transformers" not in loaded
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FAMILY = Family(" in done.stdout
