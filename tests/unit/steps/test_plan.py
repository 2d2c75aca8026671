"""The dry run prints what would happen, from the config alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain_lib.config import load_run_config
from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.models.spec import parameter_count
from steps import plan
from steps.pipeline import DEFAULT_CONFIG

GRPO = DEFAULT_CONFIG.parents[1] / "grpo" / "default.yaml"
ROOT = Path(__file__).resolve().parents[3]


def test_plan_of_the_default() -> None:
    config = load_run_config(DEFAULT_CONFIG, ["train.steps=100", "train.rows_per_step=8", "train.row_tokens=512"])
    text = plan.describe(config)
    assert "100 steps x 4,096 token slots" in text
    assert "at most 409,600" in text
    assert "parameters" in text


def test_names_and_files_are_checked_before_the_run(tmp_path: Path) -> None:
    wrong = [
        ("train.loss=sfd", "did you mean 'sft'"),
        ("train.optimizer.name=adamm", "did you mean 'adamw'"),
    ]
    for override, said in wrong:
        with pytest.raises(ConfigError, match=said):
            plan.describe(load_run_config(DEFAULT_CONFIG, [override]))
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    start = text.index("generate:")
    path = tmp_path / "run.yaml"
    path.write_text(text[:start] + "path: nothing-here/*.jsonl}" + text[text.index("\n", start) :], encoding="utf-8")
    with pytest.raises(DataError, match="nothing-here"):
        plan.describe(load_run_config(path))
    path.write_text(text.replace("name: generated,", "name: generated, format: message,"), encoding="utf-8")
    with pytest.raises(ConfigError, match="is 'messages' meant"):
        plan.describe(load_run_config(path))


def test_a_mixture_is_spelt_out() -> None:
    shares = "train.mixture={by: tokens, sources: {generated: {weight: [[1, 0.5], [9, 2]]}}}"
    name = load_run_config(DEFAULT_CONFIG).data.sources[0].name
    text = plan.describe(load_run_config(DEFAULT_CONFIG, [shares.replace("generated", name)]))
    assert f"by tokens: {name} 0.5 at step 1 -> 2 at step 9, then repeat" in text


def test_seventy_billion_parameters_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    """64 nodes of 8 GPUs, planned without weights, data or a GPU."""
    plan.main(["--config", str(ROOT / "configs/sft/llama_70b.yaml")])
    printed = capsys.readouterr().out
    assert "70,553,706,496 parameters" in printed
    assert "512 device(s) on 64 node(s): replicate 8 x shard 8 x context 1 x tensor 8" in printed
    assert "GiB of 78.4 GiB a device (H100)" in printed
    assert "tensor 8: devices that share a token's heads" in printed
    assert "at 40% of H100's peak" in printed


def test_what_cannot_fit_is_refused_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "compute.gpu=A10", "--config", str(ROOT / "configs/sft/llama_70b.yaml")]
    with pytest.raises(SystemExit):
        plan.main(settings)
    said = capsys.readouterr()
    assert "activations" in said.out, "the plan stands above the refusal"
    assert "a device would need" in said.err and "has 23.5" in said.err
    assert "no single change that was tried fits; these together do: compute.mesh: {shard: 32, context: 2" in said.err


def test_data_of_other_machines_is_not_asked_for() -> None:
    sources = "data.sources=[{name: far, path: /on/the/cluster/*.jsonl}, {name: near, generate: {rows: 100}}]"
    text = plan.describe(load_run_config(DEFAULT_CONFIG, [sources, "compute.address=head:6379"]))
    assert "not here   far: its files are not on this machine and were not checked" in text
    with pytest.raises(DataError, match=r"jsonl"):
        plan.describe(load_run_config(DEFAULT_CONFIG, [sources]))


def test_unsupported_family_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    config = load_run_config(DEFAULT_CONFIG, ["model.from_scratch=null", f"model.path={tmp_path}"])
    with pytest.raises(ModelError, match="mamba"):
        plan.describe(config)


def test_command_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--resolved", "--set", "train.steps=70"])
    printed = capsys.readouterr().out
    assert "plan of" in printed
    assert "steps: 70" in printed


def test_command_names_a_misspelt_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--set", "train.stps=7"])
    assert stopped.value.code == 1
    assert "did you mean 'steps'?" in capsys.readouterr().err


def test_new_tokens_are_counted() -> None:
    """A row of the (tied) embedding for each token behind the tokenizer's."""
    plain = load_run_config(DEFAULT_CONFIG)
    more = load_run_config(DEFAULT_CONFIG, ["model.vocabulary={add_blocks: [{format: '<item_{n}>', count: 100}]}"])
    before, after = plan._spec(plain), plan._spec(more)
    assert before is not None and after is not None
    assert after.config.vocab_size == before.config.vocab_size + 100
    rows = 1 if before.config.tie_word_embeddings else 2
    assert parameter_count(after.config) == parameter_count(before.config) + rows * 100 * before.config.hidden_size


def test_new_tokens_of_a_found_model_fill_its_spare_rows_first(tmp_path: Path) -> None:
    plain = plan._spec(load_run_config(DEFAULT_CONFIG))
    assert plain is not None
    vocabulary = {f"t{number}": number for number in range(plain.config.vocab_size - 30)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (tmp_path / "config.json").write_text(json.dumps(dict(plain.hf_config)))
    for count, rows in ((30, plain.config.vocab_size), (31, plain.config.vocab_size + 1)):
        added = f"model.vocabulary={{add_blocks: [{{format: '<item_{{n}}>', count: {count}}}]}}"
        overrides = ["model.from_scratch=null", f"model.path={tmp_path}", added]
        grown = plan._spec(load_run_config(DEFAULT_CONFIG, overrides))
        assert grown is not None and grown.config.vocab_size == rows


def test_adapters_are_spelt_out() -> None:
    """Two projections of [32, 32] and a rank of 4: 2 x 4 x 64 parameters a layer."""
    text = plan.describe(load_run_config(DEFAULT_CONFIG, ["model.lora={rank: 4, alpha: 8, targets: [q_proj, o_proj]}"]))
    config = load_run_config(DEFAULT_CONFIG).model.from_scratch
    assert config is not None
    shape = config.architecture
    heads = shape["num_attention_heads"] * shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    trained = 2 * 4 * (shape["hidden_size"] + heads) * shape["num_hidden_layers"]
    assert f"LoRA of rank 4, alpha 8, on q_proj, o_proj: {trained:,} parameters are trained" in text
    assert "adapters" not in plan.describe(load_run_config(DEFAULT_CONFIG))


def test_a_model_that_is_here_is_looked_at(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    def planned(path: str) -> str:
        return plan.describe(load_run_config(DEFAULT_CONFIG, ["model.from_scratch=null", f"model.path={path}"]))

    sized = ["data.max_example_tokens=32", "model.from_scratch=null", f"model.path={tiny_folder('llama')}"]
    assert "model      llama" in plan.describe(load_run_config(DEFAULT_CONFIG, sized))
    assert "owner/name (fetched when the run starts)" in planned("owner/name")
    with pytest.raises(ConfigError, match="does not exist"):
        planned("/nope/x")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        planned(str(tmp_path))
    assert caught.value.got == "an empty folder"
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        planned(str(tmp_path / "model"))


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    name = load_run_config(DEFAULT_CONFIG).data.sources[0].name
    source = f"data.sources=[{{name: {name}, path: {tmp_path / 'rows.jsonl'}, format: preference}}]"
    with pytest.raises(ConfigError, match="does not train on rows of this format"):
        plan.describe(load_run_config(DEFAULT_CONFIG, [source, "model.from_scratch.tokenizer=owner/name"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rows_per_step=3", r"micro_batch_rows"),
        ("optimizer.name=adamx", "adamx"),
        ("loss=dpo", "does not train on rows of this format"),
        ("loss_options={smoothing: 1}", "smoothing"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused_before_the_run(change: str, words: str) -> None:
    config = load_run_config(GRPO, [f"grpo.warm_start.train.{change}"])
    with pytest.raises(ConfigError, match=words):
        plan.describe(config)


def test_a_warm_start_may_last_until_its_mixture_ends() -> None:
    changes = ["steps=null", "schedule.warmup_steps=0", "mixture={exhausted: drop}"]
    config = load_run_config(GRPO, [f"grpo.warm_start.train.{change}" for change in changes])
    assert "warm start until the mixture ends, of supervised fine-tuning" in plan.describe(config)


@pytest.mark.parametrize(
    ("recipe", "field", "changes"),
    [
        ("distill", "distill.teacher.path", []),
        ("dpo", "dpo.reference.path", []),
        ("dpo", "dpo.reference.path", ["dpo.reference.kept=live"]),
        ("grpo", "grpo.reference.path", ["grpo.kl_weight=0.1"]),
    ],
)
def test_a_frozen_model_that_is_not_there_or_damaged_is_told(
    recipe: str, field: str, changes: list[str], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def described(folder: Path) -> str:
        config = DEFAULT_CONFIG.parents[1] / recipe / "default.yaml"
        return plan.describe(load_run_config(config, [*changes, f"{field}={folder}"]))

    with pytest.raises(ConfigError, match=f"(?s)path does not exist.*{field}"):
        described(tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folder("qwen3"), damaged)
    assert described(damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="safetensors"):
        described(damaged)


def test_a_tokenizer_of_the_hub_is_fetched_when_the_run_starts() -> None:
    text = plan.describe(load_run_config(DEFAULT_CONFIG, ["model.from_scratch.tokenizer=somebody/something"]))
    assert "qwen3 with the tokenizer somebody/something (fetched when the run starts)" in text
    with pytest.raises(ConfigError, match=r"model\.from_scratch\.tokenizer"):
        plan.describe(load_run_config(DEFAULT_CONFIG, ["model.from_scratch.tokenizer=/nowhere"]))
