"""The agent that asks a language model: behind an OpenAI-compatible endpoint, or a command."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.family_file import ARCHITECTURE, MODEL_TYPE, FamilyFile
from posttrain_lib.conversion.protocol import Attempt, GiveUp
from posttrain_lib.lineage.source_digest import PROJECT_ROOT

_MODELS = PROJECT_ROOT / "posttrain_lib" / "models"
_INTERFACE = ("spec.py", "weights.py", "families/fields.py", "families/shared.py", "blocks.py", "attention.py")
#: attempts whose text and report are shown in full; of earlier ones a line each
_SHOWN = 3
_LONGEST_SOURCE = 120_000
_BLOCK = re.compile(r"```(?:python)?[ \t]*\n(.*?)```", re.DOTALL)
_GIVE_UP = re.compile(r"^\s*GIVE UP:?\s*(.+)", re.DOTALL)


class AnswerError(Exception):
    """No answer. ``again``: asking once more may help."""

    def __init__(self, what: str, *, again: bool) -> None:
        super().__init__(what)
        self.again = again


class LanguageModel(Protocol):
    """What an agent asks."""

    def answer(self, system: str, prompt: str) -> str:
        """The answer's text; AnswerError where there is none."""
        ...


@dataclass(frozen=True)
class EndpointModel:
    """``POST {base_url}/chat/completions``, as OpenAI, vLLM and others have it. The key is read from the environment
    when a request is made, and stands nowhere else."""

    base_url: str
    model: str
    api_key_variable: str | None = None
    timeout_seconds: float = 300.0
    temperature: float = 0.2
    max_tokens: int = 8192

    def answer(self, system: str, prompt: str) -> str:
        """One completion."""
        content = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key_variable and (key := os.environ.get(self.api_key_variable)):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                said = response.read()
        except urllib.error.HTTPError as error:
            raise AnswerError(f"HTTP {error.code}", again=error.code >= 500 or error.code in (408, 429)) from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise AnswerError(f"{type(error).__name__}: {error}", again=True) from error
        try:
            text = json.loads(said)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise AnswerError(f"no completion in the response ({type(error).__name__})", again=True) from error
        if not isinstance(text, str) or not text.strip():
            raise AnswerError("the completion is empty", again=True)
        return text


@dataclass(frozen=True)
class CommandModel:
    """A command that reads the brief on standard input and writes its answer to standard output."""

    command: tuple[str, ...]
    timeout_seconds: float = 300.0

    def answer(self, system: str, prompt: str) -> str:
        """Run it once."""
        try:
            done = subprocess.run(
                self.command,
                input=f"{system}\n\n{prompt}",
                capture_output=True,
                text=True,
                timeout=self.timeout_seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise AnswerError(f"the command took more than {self.timeout_seconds:g} seconds", again=True) from error
        except OSError as error:
            raise AnswerError(f"the command cannot be started: {error}", again=False) from error
        if done.returncode != 0 or not done.stdout.strip():
            said = done.stderr.strip()[-300:]
            raise AnswerError(f"the command ended with {done.returncode} and said {said!r}", again=True)
        return done.stdout


class LLMAgent:
    """Shows a language model the interface, examples, the reference's source, the brief and its earlier attempts.

    Args:
        model: what is asked.
        families: modules whose source serves as examples.
        retries: further requests where one fails, each after ``pause_seconds`` more than the one before.
    """

    name = "llm"
    named = True

    def __init__(
        self, model: LanguageModel, *, families: Sequence[str] = (), retries: int = 3, pause_seconds: float = 2.0
    ) -> None:
        self._model, self._families = model, tuple(families)
        self._retries, self._pause = retries, pause_seconds

    def propose(self, brief: Brief, history: Sequence[Attempt]) -> FamilyFile | GiveUp:
        """Ask for the next file."""
        failures: list[str] = []
        while True:
            try:
                said = self._model.answer(self._system(), prompt_of(brief, history))
                break
            except AnswerError as error:
                failures.append(str(error))
                if not error.again or len(failures) > self._retries:
                    return GiveUp(f"no answer after {len(failures)} requests: {'; '.join(failures)}")
                time.sleep(self._pause * len(failures))
        if (given_up := _GIVE_UP.match(said)) is not None:
            return GiveUp(given_up.group(1).strip()[:2000])
        blocks = _BLOCK.findall(said)
        note = f"after {len(failures)} failed requests: {'; '.join(failures)}" if failures else ""
        return FamilyFile(max(blocks, key=len) if blocks else said, note)

    def _system(self) -> str:
        sources = [_source(_MODELS / name) for name in _INTERFACE]
        sources += [_source(PROJECT_ROOT / (name.replace(".", "/") + ".py")) for name in self._families]
        return "\n\n".join((_TASK, *sources))


_TASK = f"""You write one Python file that defines a language model's architecture by data: how a config.json becomes a
DecoderConfig, and how our parameters correspond to the stored tensors. A gate then compares the decoder that it
describes with the reference implementation, module by module, and its report comes back to you.

Rules of the file:
- It ends with FAMILY = Family("{MODEL_TYPE}", "{ARCHITECTURE}", read_config, RULES); these two names stay as they are.
- It only declares: it imports from posttrain_lib.models.families, .families.fields, .families.shared, .models.spec,
  .models.weights, posttrain_lib.errors, math and typing, and from the example families below; no other import, no
  files, no network, no attribute assignment, no private names.
- Every field of config.json is read through the ConfigReader, or skipped with the reason beside it; numbers that a
  field states are not repeated.
Answer with the whole file in one ```python block. If it cannot be expressed by these blocks: GIVE UP: <reason>."""


def prompt_of(brief: Brief, history: Sequence[Attempt]) -> str:
    """The brief and the history as text."""
    parts = [f"# The model\n{json.dumps(brief.to_dict(), indent=1)}"]
    if brief.names is not None and (source := reference_source(brief.names[0])):
        parts.append(f"# The reference implementation\n```python\n{source}\n```")
    for attempt in history[:-_SHOWN]:
        parts.append(f"# Attempt {attempt.number}: {attempt.summary}")
    for attempt in history[-_SHOWN:]:
        said: Any = attempt.error if attempt.report is None else json.dumps(attempt.report, indent=1)
        parts.append(f"# Attempt {attempt.number}: {attempt.outcome}\n```python\n{attempt.text}\n```\n{said}")
    return "\n\n".join(parts)


def reference_source(model_type: str) -> str | None:
    """Source of transformers' implementation; None where it has no file of its own."""
    from importlib.util import find_spec

    found = find_spec("transformers")
    if found is None or found.origin is None:
        return None
    models = Path(found.origin).parent / "models"
    names = [model_type, model_type.removesuffix("_text")]
    paths = [models / name / f"modeling_{name}.py" for name in names]
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else path.read_text(encoding="utf-8")[:_LONGEST_SOURCE]


def _source(path: Path) -> str:
    return f"# {path.relative_to(PROJECT_ROOT)}\n```python\n{path.read_text(encoding='utf-8')}```"
