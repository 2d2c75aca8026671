"""The fallback decoder: heads as they are, documents by themselves, the same numbers as our own definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_lib.checkpoint.hf import load_hf_weights, stored_tensors
from posttrain_lib.checkpoint.verify_documents import largest, noise_limit
from posttrain_lib.errors import ModelError
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_config, spec_from_folder
from posttrain_lib.models.hf_decoder import HFDecoder, as_decoder, load_hf_decoder
from posttrain_lib.models.hf_spec import UNBOUNDED, hf_spec_from_config, hf_spec_from_folder
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.support.hf_models import HF_CASES, write_hf_model
from tests.support.tiny_models import write_tiny_model

LENGTHS = (9, 1, 23, 9, 4)  # two of one length: they share a forward


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_type -> its folder, written once. Do not change it."""
    root = tmp_path_factory.mktemp("hf")

    def folder(model_type: str) -> Path:
        path = root / model_type
        return path if path.is_dir() else write_hf_model(model_type, path)

    return folder


def load(folder: Path) -> HFDecoder:
    return load_hf_decoder(hf_spec_from_folder(folder), folder)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    """(token ids without the padding token, positions, boundaries, longest)."""
    tokens = torch.randint(1, 96, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)


def loss_and_gradients(model: torch.nn.Module, packed: tuple[Tensor, Tensor, Tensor, int]) -> tuple[Tensor, dict]:
    """The weighted loss of predicting each next token, and the gradient of every parameter."""
    targets = packed[0].roll(-1)
    weights = torch.linspace(0.1, 1.0, len(targets))
    index = torch.arange(len(targets))
    loss = model(*packed, lambda hidden, head: linear_cross_entropy(hidden, head, targets, weights, index)[0])
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "scale", "cap", "bias"),
    [("gpt_neox", 1.0, None, 0), ("cohere", 0.3, None, 0), ("granitemoe", 1 / 3, None, 0), ("nanochat", 1.0, 15.0, 0),
     ("phi", 1.0, None, 1)],
)  # fmt: skip
def test_the_head_is_measured_and_stated(
    hf_folder: Callable[[str], Path], model_type: str, scale: float, cap: float | None, bias: int
) -> None:
    head = load(hf_folder(model_type)).output_head
    assert (head.scale, head.softcap) == (scale, cap)
    assert head.weight_VD.shape == (96, 32 + bias)


@pytest.mark.parametrize("model_type", HF_CASES)
def test_packed_is_alone_in_outputs_and_gradients(hf_folder: Callable[[str], Path], model_type: str) -> None:
    """Against transformers' plain logits of each document; the limit is its float32 against its float64."""
    from posttrain_lib.adapters.hf_reference import load_reference, reference_logits

    folder, packed = hf_folder(model_type), documents()
    exact, theirs = (
        torch.cat([reference_logits(load_reference(folder, dtype=dtype), part) for part in packed[0].split(LENGTHS)])
        for dtype in (torch.float64, torch.float32)
    )
    model = load(folder)
    with torch.no_grad():
        ours = model(*packed)
    assert largest(ours.double() - exact) <= noise_limit(largest(theirs.double() - exact), exact)

    _, together = loss_and_gradients(model, packed)
    together = {name: grad.clone() for name, grad in together.items()}
    assert set(together) == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    targets, weights = packed[0].roll(-1), torch.linspace(0.1, 1.0, len(packed[0]))
    for begin, end in pairwise(packed[2].tolist()):

        def score(hidden, head, rows=slice(begin, end)):  # type: ignore[no-untyped-def]
            return linear_cross_entropy(hidden, head, targets[rows], weights[rows], torch.arange(len(hidden)))[0]

        length = end - begin
        model(packed[0][begin:end], torch.arange(length), torch.tensor([0, length]), length, score).backward()
    for name, value in model.named_parameters():
        # Sums over documents in another order: a few roundings of the largest entry.
        assert largest(together[name] - value.grad) <= 1e-5 * largest(value.grad) + 1e-7, name


@pytest.mark.parametrize("case", ["qwen3", "gemma2", "mixtral"])
def test_a_known_family_gives_the_same_loss_and_gradients_under_both_backends(tmp_path: Path, case: str) -> None:
    """What rounding does is measured: transformers' class in float32 against itself in float64."""
    folder = write_tiny_model(case, tmp_path / "hf")
    packed = documents()
    loss, theirs = loss_and_gradients(load(folder), packed)
    wide = load(folder).double()
    wide.inner.set_experts_implementation("eager")  # the grouped product has no float64
    exact_loss, exact = loss_and_gradients(wide, packed)
    spec = spec_from_folder(folder)
    native = build_model(spec)
    load_hf_weights(native, spec, folder)
    native_loss, own = loss_and_gradients(native, packed)
    assert abs(native_loss.double() - exact_loss) <= noise_limit(abs(float(loss.double() - exact_loss)), exact_loss)
    stored = stored_tensors(spec, own, torch.float32)
    compared = 0
    floor = max(largest(theirs[name].double() - value) / largest(value) for name, value in exact.items())
    for name, value in exact.items():
        mine = stored.get(name.removeprefix("inner."))
        if mine is None:
            continue  # transformers joins and renames the experts' tensors as it loads
        compared += 1
        assert largest(mine.double() - value) <= noise_limit(floor * largest(value), value), name
    assert compared >= len(exact) - 3 * spec.config.num_hidden_layers


def test_shared_beginnings_are_computed_again(hf_folder: Callable[[str], Path]) -> None:
    """A recurrent class, where sharing would be wrong in any other way."""
    model = load(hf_folder("mamba"))
    tokens, *_ = documents((12, 5))
    bounds, positions = np.array([0, 12, 17], np.int32), np.concatenate([np.arange(12), 4 + np.arange(5)])
    prefixes = SharedPrefixes.of(bounds, positions, np.array([-1, 0], np.int32)).map(torch.from_numpy)
    whole = torch.cat([tokens[:12], tokens[:4], tokens[12:]])
    with torch.no_grad():
        shared = model(tokens, torch.from_numpy(positions), torch.from_numpy(bounds), 12, prefixes=prefixes)
        plain = model(whole, whole, torch.tensor([0, 12, 21]), 12)
    # The same forwards; the head's product alone has other rows and so another rounding.
    assert torch.allclose(shared, torch.cat([plain[:12], plain[16:]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["mamba", "gpt2"])
def test_generation_is_the_greedy_one_of_transformers(hf_folder: Callable[[str], Path], model_type: str) -> None:
    from posttrain_lib.adapters.hf_reference import load_reference

    folder = hf_folder(model_type)
    model, reference = load(folder).requires_grad_(False), load_reference(folder, dtype=torch.float32)
    prompts = [[5, 9, 11], [7], [3, 3, 8, 40, 41]]
    found = greedy_generate(as_decoder(model), prompts, 6, stop_ids=[2])
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in completion:
            with torch.no_grad():
                logits = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            # equal up to rounding: the chosen one is the best within it
            assert logits[token] >= logits.max() - 1e-5
            ids.append(token)
        assert len(completion) == 6 or completion[-1] == 2
    scores = token_logprobs(as_decoder(model), [[*prompt, *more] for prompt, more in zip(prompts, found, strict=True)])
    assert [len(row) for row in scores] == [len(p) + len(m) - 1 for p, m in zip(prompts, found, strict=True)]


def test_training_mode_changes_nothing(hf_folder: Callable[[str], Path]) -> None:
    model = load(hf_folder("gpt2")).train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(*documents()), model(*documents()))


def test_facts_of_a_class(hf_folder: Callable[[str], Path]) -> None:
    spec = hf_spec_from_folder(hf_folder("gpt2"))
    assert (spec.family, spec.architecture) == ("gpt2", "GPT2LMHeadModel")
    assert (spec.config.vocab_size, spec.config.max_position_embeddings) == (96, 128)
    assert spec.config.tie_word_embeddings
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 48  # query, key and value in one; output; feed-forward
    assert (spec.body_parameters, spec.head_parameters) == (2 * layer, 96 * 32)
    assert spec.flops_per_pair == 12 * 32 * 2
    assert hf_spec_from_config({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}).config.max_position_embeddings == UNBOUNDED  # fmt: skip  # noqa: E501


def test_experts_count_by_the_share_that_a_token_goes_through(hf_folder: Callable[[str], Path]) -> None:
    spec = hf_spec_from_folder(hf_folder("granitemoe"))
    layer = 4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 48  # attention, router, two of four experts
    assert spec.body_parameters == 2 * layer


def test_an_unknown_family_names_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"model\.backend: hf"):
        spec_from_config({"model_type": "gpt_neox"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "nowhere", "auto_map": {"AutoModel": "code.py"}}, "brings its own code"),
        ({"model_type": "gpt2", "quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"model_type": "gpt2", "architectures": ["GPT2ForTokenClassification"]}, "not a plain causal"),
        ({"model_type": "gpt2", "n_embd": 33, "n_head": 2}, "refuses this configuration"),
    ],
)
def test_refused_configurations(config: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        hf_spec_from_config(config)


def test_weights_that_do_not_belong_are_refused(hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_folder("stablelm")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    name = "model.layers.0.mlp.up_proj.weight"
    for changed, said in (
        ({**tensors, "model.extra.weight": torch.zeros(2)}, "no place for"),
        ({key: value for key, value in tensors.items() if key != name}, "does not find all weights"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ModelError, match="truncated"):
        load(tmp_path)


class _Shifted(torch.nn.Module):
    """Wraps a class so that something happens to its logits that an OutputHead cannot say."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.get_output_embeddings, self.get_input_embeddings = inner.get_output_embeddings, inner.get_input_embeddings

    def forward(self, **arguments: object) -> object:
        found = self.inner(**arguments)
        found.logits = found.logits + 0.5
        return found


def test_a_head_that_does_more_is_refused(hf_folder: Callable[[str], Path]) -> None:
    from posttrain_lib.adapters.hf_reference import load_reference

    folder = hf_folder("gpt_neox")
    inner = load_reference(folder, dtype=torch.float32)
    with pytest.raises(ModelError, match="more to its logits than a scale and a soft cap") as caught:
        HFDecoder(hf_spec_from_folder(folder), _Shifted(inner))
    assert caught.value.where == "GPTNeoXForCausalLM"


def test_config_json_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        hf_spec_from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="does not hold an object"):
        hf_spec_from_folder(tmp_path)
