"""vLLM as a rollout engine (``rl.roles.RolloutRole``): real vLLM in a process of its own, weights pushed into it live.

The process samples; what a request becomes is decided here, by the same code as in the embedded engine: stop strings,
versions, ends. A process that dies or answers too late is a RolloutError with its last lines.

It differs from the embedded engine in this: a push makes vLLM compute the keys and values of unfinished requests again
with the new weights, and a seed draws other tokens. Its workers are in its process: one device an engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.adapters.vllm_channel import Channel
from posttrain_lib.adapters.vllm_worker import Sampled
from posttrain_lib.errors import RolloutError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.weights import stored_shapes
from posttrain_lib.rl.engine.condition import Condition
from posttrain_lib.rl.engine.requests import check_requests, check_sequences
from posttrain_lib.rl.engine.sequences import Running, allowed_ids
from posttrain_lib.rl.engine.stop_strings import Decode
from posttrain_lib.rl.engine.weights import checked
from posttrain_lib.schema.rollouts import Completion, Request

#: temperatures that vLLM takes, beside 0; below the first it would draw as if it were the first
_TEMPERATURES = (0.01, 2.0)
#: vLLM scores a sequence by sampling the token behind it, which is never read and needs no position
_ONE_MORE = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


class VllmEngine(Condition):
    """One vLLM engine. One caller at a time."""

    def __init__(
        self,
        folder: str | Path,
        *,
        window: int,
        slots: int,
        version: int = 0,
        decode: Decode | None = None,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        start_seconds: float,
        call_seconds: float,
        device: torch.device | None = None,
    ) -> None:
        """Start the process and load a folder.

        Args:
            folder: a Hugging Face folder of a family that vLLM and this project know, with weights of ``version``.
            window: most tokens of a prompt and its completion together.
            slots: most sequences that run at once.
            decode: tokens -> text, for stop strings; None: requests have none.
            options: further arguments of ``vllm.EngineArgs``: dtype, enforce_eager, gpu_memory_utilization,
                enable_sleep_mode.
            environment: of the process, above ``vllm_process``'s own: OMP_NUM_THREADS, VLLM_CPU_KVCACHE_SPACE.
            start_seconds: within which the engine must stand. call_seconds: within which it must answer a call.
            device: the CUDA device that it is to compute on; None: it has none.

        Raises:
            RolloutError: it does not come up.
        """
        self.version = version
        self._window, self._decode, self._seconds = window, decode, call_seconds
        self._sleeps = bool(options.get("enable_sleep_mode"))
        spec = spec_from_folder(folder)
        if window > spec.config.max_position_embeddings:
            raise RolloutError(
                "the engine's window is longer than what the model knows positions for",
                where=folder,
                got=window,
                expected=f"at most {spec.config.max_position_embeddings}",
            )
        self._shapes = stored_shapes(spec.pieces)
        self._running: dict[str, Running] = {}
        self._failed: dict[str, RolloutError] = {}
        self._ended: dict[str, Completion] = {}  # not given back yet: their step met a constraint's end
        seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": visible_number(device)}
        self._channel = Channel("posttrain_lib.adapters.vllm_worker", {**_ONE_MORE, **seen, **environment}, device)
        try:
            started = (str(folder), window, slots, version, dict(options))
            self._vocab_size: int = self._channel.call("start", *started, seconds=start_seconds)
        except RolloutError:
            self._channel.close()
            raise

    @property
    def pid(self) -> int:
        """The process's."""
        return self._channel.pid

    def submit(self, requests: Sequence[Request]) -> None:
        """See ``rl.roles.RolloutRole.submit``; none is taken where one is refused."""
        self._check_usable()
        has_text = self._decode is not None
        known = self._running.keys() | self._ended.keys()
        check_requests(requests, known, window=self._window, vocab_size=self._vocab_size, has_text=has_text)
        for request in requests:
            temperature, (lowest, highest) = request.sampling.temperature, _TEMPERATURES
            if temperature and not lowest <= temperature <= highest:
                raise RolloutError(
                    "vLLM does not sample at this temperature",
                    where=f"request {request.key}",
                    got=temperature,
                    expected=f"0, or {lowest:g} to {highest:g}",
                )
            if request.allowed is not None:
                allowed_ids(request, [], self._vocab_size)
        self._call("submit", list(requests))
        self._running.update({each.key: Running(each, self._window, self._decode) for each in requests})

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not come back."""
        return len(self._running) + len(self._ended)

    def step(self) -> list[Completion]:
        """A step of vLLM; the completions that ended.

        Raises:
            RolloutError: a constraint allows nothing: its request stays, without going on, and is to be aborted; or the
                last push failed; or the process did.
        """
        self._check_usable()
        self._check_constraints()
        if self._running:
            sampled, failures = self._call("step")
            self._failed.update({key: error for key, error in failures.items() if key in self._running})
            places = [key for each in sampled for key in self._taken(each)]
            self._leave([*places, *self._failed])
            self._check_constraints()
        ended = list(self._ended.values())
        self._ended.clear()
        return ended

    def abort(self, keys: Iterable[str] | None = None) -> list[Completion]:
        """See ``rl.roles.RolloutRole.abort``."""
        known = {*self._running, *self._ended}
        asked = known if keys is None else known & set(keys)
        self._leave([key for key in self._running if key in asked and key not in self._failed])
        ended = [self._ended.pop(key) for key in list(self._ended) if key in asked]
        for key in [key for key in self._running if key in asked]:
            self._failed.pop(key, None)
            ended.append(self._running.pop(key).completion("aborted"))
        return ended

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """See ``rl.roles.RolloutRole.push``. After an error the engine refuses to work until a push succeeds."""
        self._check_open()
        self._unusable = f"the push of version {version} failed"
        checked_weights = checked(weights, self._shapes)
        digest: str = self._channel.push("push", checked_weights, version, seconds=self._seconds)
        self.version, self._unusable = version, None
        return digest

    def logprobs(self, sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[np.ndarray]:
        """See ``rl.roles.RolloutRole.logprobs``."""
        self._check_usable()
        check_sequences(sequences, begins, window=self._window, vocab_size=self._vocab_size)
        scored: list[np.ndarray] = self._call("logprobs", [list(each) for each in sequences], list(begins))
        return scored

    def sleep(self) -> None:
        """Give device memory away where ``enable_sleep_mode`` is among the options; else nothing."""
        self._check_may_sleep()
        if self._sleeps:
            self._call("sleep")

    def wake(self) -> None:
        """Come back from :meth:`sleep`."""
        self._check_open()
        if self._sleeps:
            self._call("wake")

    def close(self) -> None:
        """End the process."""
        if not self._closed:
            self._closed = True
            self._channel.close()

    def _taken(self, sampled: Sampled) -> list[str]:
        """Add new tokens to their request; its key where it ended here and not in vLLM."""
        sequence = self._running.get(sampled.key)
        if sequence is None or sampled.key in self._failed:
            return []
        finish = None
        for token, logprob in zip(sampled.tokens, sampled.logprobs, strict=True):
            finish = sequence.take(token, logprob, sampled.version)
            if finish is not None:  # what vLLM sampled behind it in the same step is nobody's
                break
        if finish is None:
            if sampled.ended is not None:
                raise RolloutError("vLLM ended a request by itself", where=f"request {sampled.key}", got=sampled.ended)
            return []
        self._ended[sampled.key] = self._running.pop(sampled.key).completion(finish)
        return [] if sampled.ended is not None else [sampled.key]

    def _leave(self, keys: Sequence[str]) -> None:
        if keys:
            self._call("abort", list(keys))

    def _call(self, what: str, *arguments: Any) -> Any:
        return self._channel.call(what, *arguments, seconds=self._seconds)

    def _check_constraints(self) -> None:
        for error in self._failed.values():
            raise error


def vllm_engine(
    folder: str,
    *,
    window: int,
    decode: Decode,
    device: torch.device,
    slots: int = 64,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    start_seconds: float = 600.0,
    call_seconds: float = 300.0,
) -> VllmEngine:
    """The engine as a run file makes it (``rl.run.ENGINES``); arguments as :class:`VllmEngine`'s.

    On a CPU in float32, as the trainer computes there; elsewhere in vLLM's own choice of dtype, which ``options`` may
    change.
    """
    own: dict[str, Any] = {"dtype": "float32", "enforce_eager": True} if device.type == "cpu" else {}
    return VllmEngine(
        folder,
        window=window,
        slots=slots,
        decode=decode,
        options={**own, **(options or {})},
        environment={"OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})},
        start_seconds=start_seconds,
        call_seconds=call_seconds,
        device=device if device.type == "cuda" else None,
    )


def visible_number(device: torch.device) -> str:
    """What CUDA_VISIBLE_DEVICES is for a process that shall see this CUDA device alone: this process's own list may
    have given the device another number."""
    number = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if visible is None else visible.split(",")[number].strip()
