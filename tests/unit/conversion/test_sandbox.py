"""Proposals that mean harm, run for real: the text check is off, the sandbox has to hold by itself."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.conversion.sandbox import Limits, SandboxResult, run_proposal

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
}
# Seconds that a proposal gets: a harmless one needs a few hundredths.
LIMITS = Limits(seconds=2.0, memory_gib=0.5)


def run(text: str, **options: Any) -> SandboxResult:
    return run_proposal(text, CONFIG, limits=LIMITS, check_text=False, **options)


def test_a_plain_family_file_is_read(as_proposal: Callable[[str], str]) -> None:
    result = run_proposal(as_proposal("llama"), CONFIG, limits=LIMITS)
    assert result.outcome == "read"
    assert result.family is not None
    assert result.family.config.num_hidden_layers == 2
    assert "audit hook" in result.layers


def test_a_field_that_nothing_reads_is_named(as_proposal: Callable[[str], str]) -> None:
    result = run_proposal(as_proposal("llama"), {**CONFIG, "new_trick": 3}, limits=LIMITS)
    assert result.outcome == "failed"
    assert "new_trick" in str(result.error)


def test_the_checker_of_the_text_comes_first() -> None:
    assert run_proposal("import os", CONFIG, limits=LIMITS).outcome == "refused"


@pytest.mark.parametrize("text", ["while True: pass", "import time\ntime.sleep(1000)"], ids=["loop", "sleep"])
def test_endless_work_is_stopped(text: str) -> None:
    result = run(text)
    assert result.outcome == "timeout"
    assert "2 seconds" in str(result.error)


def test_memory_is_limited() -> None:
    result = run("x = [bytearray(1 << 28) for _ in range(100)]")
    assert result.outcome == "failed"
    assert "MemoryError" in str(result.error)


@pytest.mark.parametrize(
    "text",
    [
        "open(TARGET, 'w').write('x')",
        "import os\nos.open(TARGET, os.O_CREAT | os.O_WRONLY)",
        "import pathlib\npathlib.Path(TARGET).mkdir()",
        "import os\nos.symlink('/etc', TARGET)",
        "import subprocess\nsubprocess.run(['touch', TARGET])",
        "import os\nos.system('touch ' + TARGET)",
        "import os\nif os.fork() == 0: open(TARGET, 'w')",
        "import shutil\nshutil.copyfile('/etc/passwd', TARGET)",
    ],
)
def test_nothing_outside_its_folder_is_written(text: str, tmp_path: Path) -> None:
    target = tmp_path / "written"
    result = run(text.replace("TARGET", repr(str(target))))
    assert result.outcome == "failed"
    assert "PermissionError" in str(result.error)
    assert not target.exists()


def test_the_kernel_holds_where_the_hook_does_not(tmp_path: Path) -> None:
    """A program started behind the audit hook's back is confined as well."""
    target = tmp_path / "written"
    text = f"""
import _posixsubprocess, os, time
read, write = os.pipe()
command = [b"/usr/bin/touch", {os.fsencode(target)!r}]
_posixsubprocess.fork_exec(command, command[:1], True, (write,), None, None, -1, -1, -1, -1, -1, -1, read, write, False,
    False, -1, None, None, None, -1, None, True)
time.sleep(0.5)
"""
    subprocess.run([sys.executable, "-c", text], check=True)
    assert target.exists(), "the text does what it is meant to, where nothing holds it in"
    target.unlink()
    if not any("Landlock" in layer for layer in run("x = 1").layers):
        pytest.skip("this kernel has no Landlock: only the audit hook holds a proposal in")
    assert run(text).outcome == "failed"
    assert not target.exists()


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "PermissionError" in str(result.error)


def test_no_variable_of_this_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    result = run("import os\nraise ValueError(dict(os.environ))")
    assert "PATH" in str(result.error)
    assert "s3cret" not in str(result.error)


@pytest.mark.parametrize(
    ("text", "outcome", "said"),
    [
        ("def f(:", "failed", "SyntaxError"),
        ("raise SystemExit(0)", "failed", "SystemExit"),
        ("import os\nos._exit(0)", "failed", "no answer"),
        ("import os\nos._exit(3)", "killed", "ended with 3"),
        ("FAMILY = 3", "failed", "not a Family"),
        ("X = 1", "failed", "FAMILY"),
    ],
)
def test_a_broken_proposal_is_said_to_be_one(text: str, outcome: str, said: str) -> None:
    result = run(text)
    assert (result.outcome, said in str(result.error)) == (outcome, True), result


def test_a_family_that_was_taken_out_is_not_found() -> None:
    name = "posttrain_lib.models.families.llama"
    assert "ModuleNotFoundError" in str(run(f"import {name}", removed={name}).error)


def test_an_answer_that_is_no_definition_is_refused() -> None:
    """A proposal that writes the answer itself gains nothing: it is taken apart like any other."""
    forged = json.dumps({"family": {"class": "FamilyData", "passed": True}, "layers": []})
    text = f"""
import os
for descriptor in range(3, 20):
    try:
        os.write(descriptor, {forged.encode()!r})
    except OSError:
        pass
os._exit(0)
"""
    result = run(text)
    assert result.family is None
    assert "plain data" in str(result.error)
