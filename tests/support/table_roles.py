"""The roles that are models, played by a table of bigrams: what the contracts want, in microseconds and to the bit.

A token's logits are the row of the token before it, plus a bias: ``logits = table[before] + bias``. Engine, policy and
reference compute them by one function, in float64 of float32 weights, and keep what ``tests/contracts`` asks of the
real ones. Asleep or closed they refuse every call that the roles forbid then.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_lib.errors import RolloutError
from posttrain_lib.losses.policy import ADVANTAGES
from posttrain_lib.rl.allowed_sets import allowed_sets
from posttrain_lib.rl.engine.requests import check_requests, check_sequences
from posttrain_lib.rl.engine.sequences import Running, allowed_ids
from posttrain_lib.rl.engine.stop_strings import Decode
from posttrain_lib.rl.engine.weights import checked
from posttrain_lib.rl.packing import pack_samples
from posttrain_lib.rl.roles import Weights
from posttrain_lib.rl.sync_guard import Digest
from posttrain_lib.schema.reports import StepReport, TrainResult, first_report
from posttrain_lib.schema.rollouts import Completion, Request, TrainSample
from posttrain_lib.training.job import TrainJob

FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Table:
    """The model: ``table`` [V, V] and ``bias`` [V], float32."""

    table: Tensor
    bias: Tensor

    @classmethod
    def random(cls, vocabulary: int, seed: int = 0) -> Table:
        """Logits of standard deviation 1 or so."""
        generator = torch.Generator().manual_seed(seed)
        return cls(*(torch.randn(shape, generator=generator) for shape in ((vocabulary, vocabulary), (vocabulary,))))

    @classmethod
    def holding(cls, weights: Weights) -> Table:
        """The model of these weights, copied."""
        values = {name: value.clone() for name, value in weights}
        return cls(values["bigram.table"], values["bigram.bias"])

    @classmethod
    def read(cls, folder: Path) -> Table:
        """The model of a folder."""
        return cls.holding(load_file(folder / FILE).items())

    def write(self, folder: Path) -> Path:
        """A folder that holds it."""
        folder.mkdir(parents=True)
        save_file(dict(self.weights()), folder / FILE)
        return folder

    @property
    def vocabulary(self) -> int:
        """Ids are below."""
        return len(self.bias)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name."""
        yield from (("bigram.table", self.table), ("bigram.bias", self.bias))

    def logits(self, tokens: Sequence[int] | np.ndarray) -> Tensor:
        """Float64 [T, V], behind each of the tokens."""
        before = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        return self.table[before].double() + self.bias.double()


class TableEngine:
    """``rl.roles.RolloutRole``: a token a step of each of the ``slots`` requests that came first."""

    def __init__(
        self, model: Table, *, window: int, slots: int = 8, version: int = 0, decode: Decode | None = None
    ) -> None:
        self.version, self.model = version, model
        self._window, self._slots, self._decode = window, slots, decode
        self._running: dict[str, Running] = {}
        self._away: str | None = None
        self._broken: str | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        """Behind those that are there."""
        self._check()
        size, has_text = self.model.vocabulary, self._decode is not None
        check_requests(requests, self._running, window=self._window, vocab_size=size, has_text=has_text)
        for request in requests:
            if request.allowed is not None:
                allowed_ids(request, [], size)
        self._running.update({each.key: Running(each, self._window, self._decode) for each in requests})

    def step(self) -> list[Completion]:
        """A token each; constraints are all asked before anything is drawn."""
        self._check()
        running = list(self._running.values())[: self._slots]
        ended = []
        for sequence, allowed in [(each, each.allowed(self.model.vocabulary)) for each in running]:
            finish = sequence.take(*self._drawn(sequence, allowed), self.version)
            if finish is not None:
                ended.append(self._running.pop(sequence.request.key).completion(finish))
        return ended

    @property
    def unfinished(self) -> int:
        """Requests that are there."""
        return len(self._running)

    def abort(self, keys: Iterable[str] | None = None) -> list[Completion]:
        """With the tokens that they have."""
        asked = set(self._running if keys is None else keys)
        return [self._running.pop(key).completion("aborted") for key in list(self._running) if key in asked]

    def push(self, weights: Weights, version: int) -> str:
        """Refuses everything behind a push that failed, until one succeeds."""
        self._check_there()
        self._broken = f"the push of version {version} failed"
        received, shapes = Digest(), {name: tuple(value.shape) for name, value in self.model.weights()}
        self.model = Table.holding(checked(received.through(weights), shapes))
        self.version, self._broken = version, None
        return received.text()

    def logprobs(self, sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[np.ndarray]:
        """Of the tokens from each sequence's beginning on."""
        self._check()
        check_sequences(sequences, begins, window=self._window, vocab_size=self.model.vocabulary)
        return [
            _of_tokens(self.model.logits(tokens[begin - 1 : -1]), np.asarray(tokens[begin:])).float().numpy()
            for tokens, begin in zip(sequences, begins, strict=True)
        ]

    def sleep(self) -> None:
        """Nothing but :meth:`wake` and :meth:`close` is allowed then."""
        self._check_there()
        if self._running:
            raise RolloutError("an engine with work to do cannot sleep", got=f"{self.unfinished} unfinished requests")
        self._away = "it sleeps"

    def wake(self) -> None:
        """As it was."""
        if self._away == "it sleeps":
            self._away = None
        self._check_there()

    def close(self) -> None:
        """For ever."""
        self.abort()
        self._away = "it was closed"

    def _check_there(self) -> None:
        if self._away is not None:
            raise RolloutError("the engine does not work", got=self._away)

    def _check(self) -> None:
        self._check_there()
        if self._broken is not None:
            raise RolloutError("the engine does not work", got=self._broken)

    def _drawn(self, sequence: Running, allowed: np.ndarray | None) -> tuple[int, float]:
        """(token, its log-probability): the inverse of the distribution function, ids in order."""
        before = (*sequence.request.prompt_ids, *sequence.tokens)[-1]
        ids = np.arange(self.model.vocabulary) if allowed is None else allowed
        temperature, draw = sequence.request.sampling.temperature, sequence.draw()
        logprobs = (self.model.logits([before])[0, ids] / (temperature or 1.0)).log_softmax(-1).numpy()
        place = int(logprobs.argmax())
        if temperature:
            place = min(int(np.searchsorted(np.exp(logprobs).cumsum(), draw, side="right")), len(ids) - 1)
        return int(ids[place]), float(logprobs[place])


class TableReference:
    """``rl.roles.ReferenceRole``."""

    def __init__(self, model: Table, row_tokens: int, temperature: float = 1.0) -> None:
        self.model, self.row_tokens, self.temperature = model, row_tokens, temperature

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Float32 [N] each."""
        return _scored(self.model, samples, self.row_tokens, self.temperature)

    def close(self) -> None:
        """Nothing is held."""


class TablePolicy:
    """``rl.roles.PolicyRole``: plain policy gradients and plain steps, of a job whose model folder holds a table.

    A checkpoint is one file, which is there whole or not at all.
    """

    def __init__(self, job: TrainJob, temperature: float = 1.0) -> None:
        self.version, self.tokens_seen = 0, 0
        self._model, self._temperature = Table.read(Path(job.model_folder)), temperature
        self._train, self._folder = job.train, Path(job.work_dir) / "checkpoints"
        self._best: tuple[float, int] | None = None

    def resume(self) -> tuple[dict[str, Any], StepReport] | None:
        """From the newest checkpoint."""
        files = sorted(self._folder.glob(f"*/{FILE}"))
        if not files:
            return None
        self._model = Table.read(files[-1].parent)
        with safe_open(files[-1], "pt") as file:
            state = json.loads(file.metadata()["state"])
        self.version, self.tokens_seen, self._best = state["version"], state["tokens_seen"], state["best"]
        return state["controller"], StepReport(**state["report"])

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        """The mean over tokens of advantage times log-probability, one step up."""
        _check_lengths(samples, self._train.row_tokens)
        model = Table(*(value.detach().clone().requires_grad_() for _, value in self._model.weights()))
        worth = torch.from_numpy(np.concatenate([sample.signals[ADVANTAGES] for sample in samples]))
        said = torch.cat([_of_sample(model, sample, self._temperature) for sample in samples])
        loss = -(worth * said).mean()
        gradients = torch.autograd.grad(loss, (model.table, model.bias))
        lr = self._train.optimizer.lr
        steps = zip(self._model.weights(), gradients, strict=True)
        self._model = Table(*(value - lr * gradient for (_, value), gradient in steps))
        self.version += 1
        self.tokens_seen += sum(len(sample.token_ids) for sample in samples)
        return dataclasses.replace(
            first_report(int(self._train.steps or 0)),
            step=self.version,
            loss=float(loss.detach()),
            lr=lr,
            grad_norm=float(torch.cat([each.flatten() for each in gradients]).norm()),
            trained_weight=float(len(worth)),
            tokens_seen=self.tokens_seen,
        )

    def logprobs(self, samples: Sequence[TrainSample], *, temperature: float | None = None) -> list[np.ndarray]:
        """Float32 [N] each."""
        return _scored(self._model, samples, self._train.row_tokens, temperature or self._temperature)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name."""
        return self._model.weights()

    def save(self, controller: dict[str, Any], report: StepReport, *, wait: bool = False) -> None:
        """Written when this returns."""
        held_out = report.held_out
        if held_out is not None and (self._best is None or held_out["all"] < self._best[0]):
            self._best = held_out["all"], self.version
        state = {"controller": controller, "report": dataclasses.asdict(report), "version": self.version,
                 "tokens_seen": self.tokens_seen, "best": self._best}  # fmt: skip
        folder = self._path(self.version)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self._model.weights()), folder / "unfinished", metadata={"state": json.dumps(state)})
        os.replace(folder / "unfinished", folder / FILE)

    def result(self) -> TrainResult:
        """As saved."""
        return TrainResult(
            step=self.version,
            tokens_seen=self.tokens_seen,
            last_checkpoint=str(self._path(self.version)),
            best_checkpoint=None if self._best is None else str(self._path(self._best[1])),
            best_held_out=None if self._best is None else self._best[0],
            first_held_out=None,
            stopped_early=False,
        )

    def close(self) -> None:
        """Nothing is being written."""

    def _path(self, version: int) -> Path:
        return self._folder / f"{version:06d}"


def _scored(model: Table, samples: Sequence[TrainSample], row_tokens: int, temperature: float) -> list[np.ndarray]:
    _check_lengths(samples, row_tokens)
    return [_of_sample(model, sample, temperature).float().numpy() for sample in samples]


def _check_lengths(samples: Sequence[TrainSample], row_tokens: int) -> None:
    """As the real roles do, which pack."""
    if samples:
        pack_samples(samples, row_tokens=row_tokens)


def _of_sample(model: Table, sample: TrainSample, temperature: float) -> Tensor:
    """Float64 [N], among what each token could be."""
    places = np.flatnonzero(sample.trained)
    logits = model.logits(sample.token_ids[places - 1]) / temperature
    sets = allowed_sets([sample])
    masks = torch.zeros_like(logits)
    for mask, number in zip(masks, sets.set_of, strict=True):
        if number >= 0:
            mask.fill_(float("-inf"))[sets.ids[sets.offsets[number] : sets.offsets[number + 1]]] = 0.0
    return _of_tokens(logits + masks, sample.token_ids[places])


def _of_tokens(logits_TV: Tensor, tokens: np.ndarray) -> Tensor:
    chosen = torch.from_numpy(tokens.astype(np.int64))[:, None]
    return logits_TV.log_softmax(-1).gather(1, chosen)[:, 0]
