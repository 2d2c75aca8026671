"""A grown folder: new tokens in tokenizer, embedding and head; every old byte, id and logit as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from posttrain_lib.adapters import vllm_check, vllm_process
from posttrain_lib.adapters.hf_reference import load_reference, reference_logits
from posttrain_lib.checkpoint.hf import check_hf_folder, save_hf_folder
from posttrain_lib.checkpoint.hf_files import StoredTensors
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.engine_texts import SAMPLES, gate_texts
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ModelError
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.growth import RECORD, Growth, grow_folder
from posttrain_lib.models.growth_tokenizer import (
    NewToken,
    add_to_files,
    check_new,
    first_free_id,
    load_tokenizer,
    prove,
)
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from tests.support.tiny_models import CASES, write_tiny_model, write_tiny_score_model

TOKENS = [NewToken("<|item|>", special=True), *(NewToken(f"<item_{n}>") for n in range(20))]
HOW: dict[str, Any] = {"initialise": "mean", "noise": 1e-5, "seed": 0}
OLD_TEXTS = ["Add 3 and 4.", "  two  spaces\n", "日本語 🙂 <|im_start|>user\nhi<|im_end|>\n", "<item> <|item", ""]

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 300, folder)
    return folder


@pytest.fixture(scope="module")
def known(tokenizer_folder: Path) -> int:
    """Ids of the tokenizer."""
    return len(load_tokenizer(tokenizer_folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, known: int) -> ModelMaker:
    """A case of the tiny models with the tokenizer, ``unused`` rows behind its last id."""
    root = tmp_path_factory.mktemp("models")

    def folder(case: str, unused: int = 0, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{case.replace(' ', '')}-{unused}-{dtype}"
        if not path.is_dir():
            write_tiny_model(case, path, dtype, vocab_size=known + unused)
            shutil.copytree(tokenizer_folder, path, dirs_exist_ok=True)
        return path

    return folder


def vocabulary_tensors(folder: Path) -> set[str]:
    return {"model.embed_tokens.weight", "lm_head.weight"} & set(StoredTensors(folder).entries)


def assert_grown(source: Path, out: Path, grown: Growth) -> None:
    """Old rows and all other tensors bit-equal, in order and dtype; every other file byte-equal."""
    before, after = StoredTensors(source), StoredTensors(out)
    assert list(before.entries) == list(after.entries)
    old, new = slice(0, grown.first_id), slice(grown.first_id, grown.first_id + grown.count)
    for name, entry in before.entries.items():
        left, right = before.read(name), after.read(name)
        assert entry.dtype == after.entries[name].dtype
        if name not in vocabulary_tensors(source):
            assert torch.equal(left, right), name
            continue
        assert right.shape == (grown.vocab_size, left.shape[1])
        assert torch.equal(left[old], right[old])
        assert torch.equal(left[new.stop :], right[new.stop : grown.vocab_size])
        assert torch.isfinite(right[new]).all() and right[new].any(dim=1).all()
    changed = {"tokenizer.json", "tokenizer_config.json", "config.json", RECORD}
    for path in source.iterdir():
        if path.name not in changed and ".safetensors" not in path.name:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert configs[1] == {**configs[0], "vocab_size": grown.vocab_size}
    check_hf_folder(out)


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_keeps_its_old_bytes_and_logits(case: str, tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    source, out = tiny(case), tmp_path / "grown"
    grown = grow_folder(source, out, TOKENS, **HOW)
    assert grown == Growth(known, 21, known, known + 21)
    assert_grown(source, out, grown)
    assert spec_from_folder(out).config.tie_word_embeddings == spec_from_folder(source).config.tie_word_embeddings

    ids, layout = torch.randint(known, (30,)), (torch.tensor([0, 30], dtype=torch.int32), 30)
    # As many rows in memory on both sides: products of one shape, so the same sums in the same order.
    before, after = (load_model(folder, pad_vocabulary_to=512) for folder in (source, out))
    ours, old = after(ids, torch.arange(30), *layout), before(ids, torch.arange(30), *layout)
    assert torch.equal(ours[:, :known], old[:, :known])
    assert torch.isfinite(ours[:, : known + 21]).all()


def test_a_reward_model_grows_in_its_embedding_alone(tokenizer_folder: Path, known: int, tmp_path: Path) -> None:
    source, out = write_tiny_score_model("llama", tmp_path / "model", vocab_size=known), tmp_path / "grown"
    shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
    assert_grown(source, out, grow_folder(source, out, TOKENS, **HOW))
    assert spec_from_folder(out).config.score_head


@pytest.mark.parametrize("case", ["llama", "granite"])  # untied, tied
def test_transformers_sees_the_same_old_logits(case: str, tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    grow_folder(tiny(case), tmp_path / "out", TOKENS, **HOW)
    ids = torch.randint(known, (30,))
    before, after = (
        reference_logits(load_reference(folder, dtype=torch.float32), ids) for folder in (tiny(case), tmp_path / "out")
    )
    assert after.shape[1] == known + 21
    # the head's product has another width, and may sum in another order
    torch.testing.assert_close(after[:, :known], before, rtol=1e-5, atol=1e-5)


def test_a_new_token_is_one_id_and_old_texts_are_as_before(tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    grow_folder(tiny("qwen3"), tmp_path / "out", TOKENS, **HOW)
    before, after = ChatTokenizer(tiny("qwen3")), ChatTokenizer(tmp_path / "out")
    for number, token in enumerate(TOKENS):
        assert after.encode(token.token).ids.tolist() == [known + number]
        inside = after.encode(f"a{token.token} b").ids.tolist()
        assert inside == [*before.encode("a").ids.tolist(), known + number, *before.encode(" b").ids.tolist()]
    for text in [*OLD_TEXTS, *(before.render(messages, tools) for messages, tools in SAMPLES)]:
        assert after.encode(text).ids.tolist() == before.encode(text).ids.tolist(), text
    ids = after.encode("<|item|><item_7>").ids.tolist()
    assert after.decode(ids) == "<item_7>" and after.decode(ids, skip_special_tokens=False) == "<|item|><item_7>"
    assert known in after.special_ids and known + 1 not in after.special_ids


@pytest.mark.parametrize(
    "name",
    [
        "phi-3-mini",
        "gpt2",
        "mistral-v3",
        *(pytest.param(large, marks=pytest.mark.slow) for large in ("qwen3", "qwen2.5", "gpt-oss")),
    ],
)
def test_real_tokenizers_take_new_tokens(name: str, real_data: Path, tmp_path: Path) -> None:
    shutil.copytree(real_data / "tokenizers" / name, tmp_path, dirs_exist_ok=True)
    before = load_tokenizer(tmp_path)
    check_new(before, TOKENS)
    first = first_free_id(before)
    add_to_files(tmp_path, TOKENS, first)
    prove(tmp_path, before, TOKENS, first)
    template = None if before.chat_template else real_data / "chat_templates" / "llama3.jinja"
    old, new = (ChatTokenizer(folder, chat_template=template) for folder in (real_data / "tokenizers" / name, tmp_path))
    texts = gate_texts(sorted(old.markers)[:20], rounds=2)[::4]
    for text in [*OLD_TEXTS, *texts]:
        assert new.encode(text).ids.tolist() == old.encode(text).ids.tolist(), text
    assert new.encode("<item_3>").ids.tolist() == [first + 4]
    assert new.definition()["template"] == old.definition()["template"]


def test_unused_rows_are_taken_first(tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    source = tiny("qwen3", unused=40)
    grown = grow_folder(source, tmp_path / "out", TOKENS, **HOW)
    assert grown == Growth(known, 21, known + 40, known + 40)
    assert_grown(source, tmp_path / "out", grown)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    more = grow_folder(tmp_path / "out", tmp_path / "more", [NewToken(f"<b{n}>") for n in range(25)], **HOW)
    assert more == Growth(known + 21, 25, known + 40, known + 46)
    assert_grown(tmp_path / "out", tmp_path / "more", more)
    assert [len(record["tokens"]) for record in json.loads((tmp_path / "more" / RECORD).read_text())] == [21, 25]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 30), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_any_number_of_tokens_and_unused_rows(
    tiny: ModelMaker, tmp_path: Path, unused: int, count: int, dtype: torch.dtype, tied: bool
) -> None:
    source = tiny("granite" if tied else "qwen3", unused, dtype)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    grown = grow_folder(source, tmp_path / "out", [NewToken(f"<x{n}>") for n in range(count)], **HOW)
    assert_grown(source, tmp_path / "out", grown)
    assert grown.vocab_size == max(grown.vocab_size_before, grown.first_id + count)


def test_sharded_weights_keep_their_shards_and_their_index_is_right(tiny: ModelMaker, tmp_path: Path) -> None:
    source, out = tmp_path / "sharded", tmp_path / "out"
    model, spec = load_model(tiny("qwen3")), spec_from_folder(tiny("qwen3"))
    save_hf_folder(dict(model.named_parameters()), spec, tiny("qwen3"), source, "float32", max_shard_bytes=40_000)
    assert len(list(source.glob("*.safetensors"))) > 2
    assert_grown(source, out, grow_folder(source, out, TOKENS, **HOW))
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, out))
    assert after["weight_map"] == before["weight_map"]
    weights = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())


def test_a_stored_copy_of_a_tied_head_stays_a_copy(tiny: ModelMaker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("granite"), source)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    assert_grown(source, tmp_path / "out", grow_folder(source, tmp_path / "out", TOKENS, **HOW))
    text = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "note": "kept"}


def new_rows(out: Path, grown: Growth, tensor: str = "model.embed_tokens.weight") -> torch.Tensor:
    return StoredTensors(out).read(tensor)[grown.first_id : grown.first_id + grown.count]


def test_mean_rows_have_the_mean_and_the_covariance_that_they_should(
    tiny: ModelMaker, known: int, tmp_path: Path
) -> None:
    source = tiny("qwen3", unused=40)  # rows of no token, which must not enter the mean
    many = [NewToken(f"<x{n}>") for n in range(4000)]
    grown = grow_folder(source, tmp_path / "out", many, initialise="mean", noise=0.25, seed=0)
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        used, rows = (
            StoredTensors(source).read(tensor)[:known].double(),
            new_rows(tmp_path / "out", grown, tensor).double(),
        )
        deviation = used.std(0).max()
        # 4000 draws: means are off by std / 63, entries of the covariance by 1.4 variances / 63; five such are allowed
        assert (rows.mean(0) - used.mean(0)).abs().max() < 5 * 0.5 * deviation / 63
        expected = 0.25 * torch.cov(used.t(), correction=0)
        assert (torch.cov(rows.t()) - expected).abs().max() < 5 * 1.4 * 0.25 * deviation**2 / 63
        assert expected.abs().max() > 10 * 1.4 * 0.25 * deviation**2 / 63  # so zero would not pass
    assert not torch.equal(new_rows(tmp_path / "out", grown), new_rows(tmp_path / "out", grown, "lm_head.weight"))


def test_descriptions_and_plain_means_without_noise(tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    tokens = [NewToken("<add>", description="Add 3"), NewToken("<other>")]
    grown = grow_folder(tiny("qwen3"), tmp_path / "out", tokens, initialise="mean", noise=0.0, seed=0)
    ids = ChatTokenizer(tiny("qwen3")).encode("Add 3").ids.tolist()
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        old, rows = StoredTensors(tiny("qwen3")).read(tensor), new_rows(tmp_path / "out", grown, tensor)
        torch.testing.assert_close(rows[0], old[ids].mean(0))
        torch.testing.assert_close(rows[1], old.mean(0))


def test_normal_rows_and_a_description_beside_them(tiny: ModelMaker, tmp_path: Path) -> None:
    tokens = [NewToken("<add>", description="Add 3"), *(NewToken(f"<x{n}>") for n in range(2000))]
    grown = grow_folder(tiny("qwen3"), tmp_path / "out", tokens, initialise="normal", noise=0.0, seed=0)
    rows = new_rows(tmp_path / "out", grown)
    # 64,000 draws: the deviation is off by a part in 360; five such are allowed
    assert rows[1:].std().item() == pytest.approx(0.02, rel=5 / 360)
    ids = ChatTokenizer(tiny("qwen3")).encode("Add 3").ids.tolist()
    torch.testing.assert_close(rows[0], StoredTensors(tiny("qwen3")).read("model.embed_tokens.weight")[ids].mean(0))


def test_the_same_seed_gives_the_same_bytes(tiny: ModelMaker, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        grow_folder(tiny("qwen3"), tmp_path / name, TOKENS, initialise="mean", noise=1e-5, seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_mean_rows_take_little_probability_from_old_tokens(tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    """Hewitt's point: a mean row's logit is the mean logit, so no old token loses more than the new ones' share."""
    grow_folder(tiny("qwen3"), tmp_path / "out", TOKENS, **HOW)
    sequence = torch.randint(known, (30,)).tolist()
    before, after = (token_logprobs(load_model(folder), [sequence])[0] for folder in (tiny("qwen3"), tmp_path / "out"))
    lost = torch.tensor(before) - torch.tensor(after)
    # exp(mean logit) <= mean exp(logit) (Jensen), the noise moves a logit by some thousandths
    assert (lost > 0).all() and lost.max() < 1.01 * torch.log(torch.tensor((known + 21) / known))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens to add"),
        ([NewToken("  ")], "empty"),
        ([NewToken("<a>"), NewToken("<a>")], "twice"),
        ([NewToken("<|im_start|>")], "already"),
        ([NewToken("a")], "already"),
        ([NewToken("<a>", description="")], "description of a new token is empty"),
    ],
)
def test_tokens_that_cannot_be_added(tokens: list[NewToken], message: str, tiny: ModelMaker, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        grow_folder(tiny("qwen3"), tmp_path / "out", tokens, **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "ids"), [("pad_token_id", 1), ("eos_token_id", [-3, 0])])
def test_an_id_that_the_model_uses_is_given_to_no_new_token(
    field: str, ids: int | list[int], tiny: ModelMaker, known: int, tmp_path: Path
) -> None:
    """``ids`` counts from the first one that the tokenizer does not have."""
    source = Path(shutil.copytree(tiny("qwen3", unused=8), tmp_path / "model"))
    content = json.loads((source / "config.json").read_text())
    content[field] = [known + index for index in ids] if isinstance(ids, list) else known + ids
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="uses for another") as caught:
        grow_folder(source, tmp_path / "out", TOKENS, **HOW)
    assert caught.value.where.endswith(f"config.json: {field}")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer_folder: Path, known: int, tmp_path: Path) -> None:
    write_tiny_model("qwen3", tmp_path / "small", vocab_size=known - 3)
    shutil.copytree(tokenizer_folder, tmp_path / "small", dirs_exist_ok=True)
    with pytest.raises(ModelError, match="more ids than the embedding has rows") as caught:
        grow_folder(tmp_path / "small", tmp_path / "out", TOKENS, **HOW)
    assert str(known - 1) in str(caught.value.got) and str(known - 3) in str(caught.value.expected)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny_model("qwen3", tmp_path / "bare")
    with pytest.raises(ModelError, match="cannot grow"):
        grow_folder(tmp_path / "bare", tmp_path / "out", TOKENS, **HOW)


def test_a_tokenizer_that_takes_other_ids_is_refused(tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    shutil.copytree(tiny("qwen3"), tmp_path, dirs_exist_ok=True)
    before = load_tokenizer(tmp_path)
    add_to_files(tmp_path, TOKENS, known + 5)
    with pytest.raises(ModelError, match="does not take the new tokens"):
        prove(tmp_path, before, TOKENS, known + 5)


@pytest.mark.slow
@pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed")
@pytest.mark.parametrize("case", ["qwen3", "llama, tied"])
def test_vllm_serves_the_grown_vocabulary(case: str, tiny: ModelMaker, known: int, tmp_path: Path) -> None:
    # vLLM's attention on a CPU wants heads of 32
    source = write_tiny_model(case, tmp_path / "source", vocab_size=known, head_dim=32, hidden_size=64)
    shutil.copytree(
        tiny(case), source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    grow_folder(source, tmp_path / "grown", TOKENS, initialise="mean", noise=1.0, seed=0)
    # As training would leave it: padded in memory, one new token learned so well that it is what is sampled.
    spec = with_padded_vocabulary(spec_from_folder(tmp_path / "grown"), 512)
    model = load_model(tmp_path / "grown", pad_vocabulary_to=512)
    with torch.no_grad():
        model.head_weight[known + 3] *= 8
    save_hf_folder(dict(model.named_parameters()), spec, tmp_path / "grown", tmp_path / "export", "float32")
    prompts = [[5, known, known + 7, 40], [30, 31, known + 20]]
    answer = vllm_check.generate(vllm_check.Request(str(tmp_path / "export"), prompts, 8, "float32", 64))
    assert answer.token_ids == greedy_generate(model, prompts, 8, ())
    assert any(known + 3 in tokens for tokens in answer.token_ids)
    assert "<item_2>" in "".join(answer.texts)
    ours = token_logprobs(model, [p + a for p, a in zip(prompts, answer.token_ids, strict=True)])
    for mine, before, after in zip(ours, answer.prompt_logprobs, answer.logprobs, strict=True):
        # export.max_logprob_gap's own reason: vLLM packs and fuses its linears, so sums are rounded in another order
        assert mine == pytest.approx([*before, *after], abs=0.02)
