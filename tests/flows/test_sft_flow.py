"""The SFT flow as a user meets it: real Metaflow runs, real Ray workers, a tiny model."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain_lib.adapters import vllm_process
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "sft_flow.py"
TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the module's store and Metaflow runs, so that later tests can reuse and resume."""
    return tmp_path_factory.mktemp("flow")


def environment(home: Path) -> dict[str, str]:
    settings = {
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "POSTTRAIN_STORE": str(home / "store"),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings}


def flow(home: Path, *arguments: str, config: Path = TINY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FLOW), "--no-pylint", "--config", str(config), *arguments]
    if "resume" in arguments:  # Metaflow takes the origin run's config
        command = [sys.executable, str(FLOW), "--no-pylint", *arguments]
    return subprocess.run(
        command,
        env=environment(home),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def first_run(home: Path) -> str:
    done = flow(home, "run", "--tag", "kind:first")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_run_goes_through_and_says_what_it_does(first_run: str) -> None:
    for said in ("plan of tiny", "8/8", "held-out loss", "exact match", "exported to"):
        assert said in first_run


def test_the_client_finds_manifests_and_references_only(home: Path, first_run: str) -> None:
    script = (
        "from metaflow import Flow, namespace\n"
        "namespace('user:tester')\n"
        "run = list(Flow('SFTFlow').runs('kind:first'))[0]\n"
        "assert run.successful\n"
        "print(run.data.summary['steps'], run.data.manifests['export']['outputs']['hf']['uri'])\n"
        "print(run['start'].task.data.run_config['name'], run.code is not None)\n"
        "print(max(artifact.size for step in run for artifact in step.task if not artifact.id.startswith('_')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(home), cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second, size = done.stdout.splitlines()
    assert first.startswith("8 ")
    assert Path(first.split(" ", 1)[1], "model.safetensors").is_file()
    assert second == "tiny True"
    assert int(size) < 200_000  # bytes: references and figures, no tensors


def test_the_card_shows_the_run(home: Path, first_run: str) -> None:
    target = home / "report.html"
    done = flow(home, "card", "get", "end", str(target), "--id", "report")
    assert done.returncode == 0, done.stdout
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', target.read_text())
    assert data is not None
    shown = base64.b64decode(data.group(1)).decode()
    parts = (
        "tiny: SFT run report",
        "held-out loss, all",
        "Loss (nats per trained token, or per pair)",
        "Length of examples",
    )
    for said in (*parts, "what is trained is coloured", "before training", "packed = alone, gradients", "Lineage"):
        assert said in shown
    for said in ("Comparison", "perplexity: perplexity, with 95% intervals", "pass@2", "better"):
        assert said in shown
    assert 'src="http' not in target.read_text(), "the page stands alone"


def test_every_example_s_scores_are_kept(home: Path, first_run: str) -> None:
    (scores,) = (home / "store" / "steps" / "evaluate").glob("*/task_scores.jsonl")
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert {(line["task"], line["model"]) for line in lines} == {
        (task, model) for task in ("perplexity", "pass_at_k") for model in ("before", "after")
    }
    (evaluation,) = scores.parent.glob("evaluation.json")
    rows = json.loads(evaluation.read_text())["comparison"]
    counted = sum(line["task"] == "perplexity" and line["model"] == "after" for line in lines)
    assert counted == next(row for row in rows if row["task"] == "perplexity")["after"]["examples"]


def test_a_second_run_reuses_every_step(home: Path, first_run: str) -> None:
    done = flow(home, "run")
    assert done.returncode == 0, done.stdout
    for step in ("inputs", "prepare_data", "check_serving", "convert_model", "train", "evaluate", "export"):
        assert f"{step}: reused" in done.stdout


def test_only_what_changed_is_done_again(home: Path, first_run: str) -> None:
    done = flow(home, "run", "--set", "evaluation.samples=1")
    assert done.returncode == 0, done.stdout
    assert "train: reused" in done.stdout
    assert "evaluate: running, config changed" in done.stdout


def test_a_misspelt_key_fails_at_once(home: Path, tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(TINY.read_text().replace("evaluate_every_steps", "evaluate_evry_steps"))
    done = flow(home, "run", config=config)
    assert done.returncode != 0
    assert "did you mean 'evaluate_every_steps'?" in done.stdout
    assert "Traceback" not in done.stdout


def test_bad_data_stops_before_training_and_resume_goes_on(home: Path, tmp_path: Path, first_run: str) -> None:
    """The rows are mended in place; ``resume`` then takes the failed run up where it stopped."""
    found = sorted((home / "store").glob("steps/inputs/*/tokenizer"))
    rows, config = tmp_path / "rows.jsonl", tmp_path / "bad.yaml"
    rows.write_text('{"messages": [{"role": "robot", "content": "beep"}]}\n')
    text = TINY.read_text().replace("{name: generated, generate: {rows: 200}}", f"{{name: file, path: '{rows}'}}")
    config.write_text(text.replace("tokenizer_vocab_size: 320", f"tokenizer: '{found[0]}'"))
    done = flow(home, "run", config=config)
    assert done.returncode != 0
    for said in ("1 of 1 rows were refused", "rows.jsonl:1: unknown_role", "quarantine.jsonl"):
        assert said in done.stdout
    assert "Traceback" not in done.stdout
    assert "convert_model: running" not in done.stdout

    with open(rows, "w") as handle:
        for number in range(60):
            turns = [{"role": "user", "content": f"Who has {number}?"}, {"role": "assistant", "content": "Tom."}]
            handle.write(json.dumps({"messages": turns}) + "\n")
    again = flow(home, "resume", "start")
    assert again.returncode == 0, again.stdout
    assert "prepare_data: 60 rows, 0 refused" in again.stdout


@pytest.mark.slow
@pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed")
def test_tokens_that_serving_would_not_send_stop_the_flow(home: Path, tmp_path: Path) -> None:
    """The template prints a field of the messages that no server passes on to it."""
    tokenizer = tmp_path / "tokenizer"
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, tokenizer)
    rows, template, config = tmp_path / "rows.jsonl", tmp_path / "own.jinja", tmp_path / "skewed.yaml"
    with open(rows, "w") as handle:
        for number in range(60):
            asked = {"role": "user", "content": f"Who has {number}?", "secret": "!"}
            handle.write(json.dumps({"messages": [asked, {"role": "assistant", "content": "Tom."}]}) + "\n")
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.secret }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = TINY.read_text().replace("{name: generated, generate: {rows: 200}}", f"{{name: file, path: '{rows}'}}")
    text = text.replace("serving_check: off", f"serving_check: vllm\n  chat_template: '{template}'")
    config.write_text(text.replace("tokenizer_vocab_size: 320", f"tokenizer: '{tokenizer}'"))
    done = flow(home, "run", config=config)
    assert done.returncode != 0
    for part in ("training and serving make different tokens", "row rows.jsonl:1, before message 1", "'!']"):
        assert part in done.stdout
    assert "Traceback" not in done.stdout
    assert "convert_model: running" not in done.stdout


@pytest.mark.parametrize(
    "spelling",
    [
        ["--config", str(TINY), "run", "--help"],
        ["run", "--config", str(TINY), "--help"],
        [f"--config={TINY}", "run", "--help"],
        ["--config", "config", str(TINY), "run", "--help"],
    ],
    ids=["before", "behind", "equals", "metaflow's own"],
)
def test_the_config_option_is_taken_as_people_write_it(home: Path, spelling: list[str]) -> None:
    command = [sys.executable, str(FLOW), "--no-pylint", *spelling]
    done = subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--set" in done.stdout
    assert "no such option" not in done.stdout + done.stderr


def _belongs_to(pid: str, home: Path) -> bool:
    try:
        return os.fsencode(home) in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended
        return False


@pytest.mark.slow
def test_kill_of_the_training_process_is_survived(home: Path) -> None:
    command = [
        sys.executable,
        str(FLOW),
        "--no-pylint",
        "--config",
        str(TINY),
        "run",
        "--set",
        "train.steps=60,train.seed=5",
    ]
    log = home / "killed.log"
    with open(log, "w") as output:
        run = subprocess.Popen(command, env=environment(home), cwd=home, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        killed = False
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if not killed and list((home / "store" / "work" / "train").glob("*/checkpoints/step-*")):
                found = subprocess.run(["pgrep", "-f", "sft_flow.py.* step train"], capture_output=True, text=True)
                # this run's alone: others of the user's may train on the same machine
                for pid in [pid for pid in found.stdout.split() if _belongs_to(pid, home)]:
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
        assert run.wait(timeout=200) == 0, log.read_text()
    text = log.read_text()
    assert killed
    assert "resumed" in text
    assert "60/60" in text
