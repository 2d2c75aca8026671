"""The process of the vLLM engine, ``python -m posttrain_lib.adapters.vllm_worker CALLS MEMORY``: see ``vllm_engine``.

It answers "start", "submit", "step", "abort", "push", "logprobs", "sleep" and "wake". What tokens make of a request is
the driver's matter: here they are sampled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.adapters.vllm_channel import Inbox
from posttrain_lib.errors import RolloutError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import ExpertsConfig
from posttrain_lib.rl.shared_tensors import Bucket
from posttrain_lib.rl.sync_guard import Digest
from posttrain_lib.schema.rollouts import Request


@dataclass(frozen=True)
class Sampled:
    """New tokens of a request, their log-probabilities, the version they came from; ``ended``: vLLM's reason."""

    key: str
    tokens: list[int]
    logprobs: list[float]
    version: int
    ended: str | None


class Worker:
    """A vLLM engine in this process."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._engine: Any = None
        self._version = 0
        self._window = 0
        self._sampled: list[Sampled] = []

    def answer(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """The call's answer."""
        return getattr(self, f"on_{what}")(*arguments)

    def on_start(self, folder: str, window: int, slots: int, version: int, options: dict[str, Any]) -> int:
        """Load the folder; the vocabulary's size."""
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _refuse_experts(folder)
        from posttrain_lib.adapters.vllm_allowed import AllowedTokensProcessor

        self._version, self._window = version, window
        arguments = vllm.EngineArgs(
            model=folder,
            max_model_len=window + 1,  # see on_logprobs
            max_num_seqs=slots,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",
            logits_processors=[AllowedTokensProcessor],
            async_scheduling=False,  # a token is there with its step, so that its version is known
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self._engine = vllm.LLMEngine.from_engine_args(arguments)
        return int(self._engine.model_config.get_vocab_size())

    def on_submit(self, requests: Sequence[Request]) -> None:
        """Take requests that the driver has looked at."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            sampling = request.sampling
            params = SamplingParams(
                max_tokens=min(sampling.max_new_tokens, self._window - len(request.prompt_ids)),
                temperature=sampling.temperature,
                # vLLM's are signed, and -1 is none; numbers that stand side by side stay apart
                seed=request.seed % (2**63 - 1),
                stop_token_ids=sorted(sampling.stop_ids),
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                output_kind=RequestOutputKind.DELTA,
                extra_args={"request": request},
            )
            self._engine.add_request(_name(request.key), {"prompt_token_ids": list(request.prompt_ids)}, params)

    def on_step(self) -> tuple[list[Sampled], dict[str, RolloutError]]:
        """(new tokens, requests whose constraint left nothing: their last token is none)."""
        from posttrain_lib.adapters.vllm_allowed import FAILURES

        if not self._sampled:
            self._step()
        sampled, self._sampled = self._sampled, []
        failures = dict(FAILURES)
        FAILURES.clear()
        return sampled, failures

    def on_abort(self, keys: Sequence[str]) -> None:
        """Leave these requests, and what is not told yet of them: another may have their key."""
        from posttrain_lib.adapters.vllm_allowed import FAILURES

        self._engine.abort_request([_name(key) for key in keys])
        for key in keys:
            FAILURES.pop(key, None)
        self._sampled = [each for each in self._sampled if each.key not in keys]

    def on_push(self, first: Bucket, version: int) -> str:
        """Load the tensors of a push; their digest.

        What the old weights left in the cache goes, or later prompts would find it there: requests on their way are
        computed again from their tokens.
        """
        received = Digest()
        weights = received.through(self._inbox.tensors(first))
        # vLLM keeps the tensors of a layer until it has them all; on a device others lie in their place by then
        kept = ((name, value.clone() if value.is_cuda else value) for name, value in weights)
        self._engine.collective_rpc(_reload, args=(kept,))
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._version = version
        return received.text()

    def on_logprobs(self, sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[np.ndarray]:
        """Of given tokens, at temperature 1; what else runs goes on meanwhile.

        vLLM scores a prompt and samples a token behind it, which is left.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # prompts that are scored are not looked for in the prefix cache
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        names = [f"score {number}" for number in range(len(sequences))]
        for name, sequence in zip(names, sequences, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": list(sequence)}, params)
        tables: dict[str, Any] = {}
        while len(tables) < len(names):
            tables.update(self._step())
        return [
            np.array(
                [tables[name][place][token].logprob for place, token in enumerate(sequence) if place >= begin],
                dtype=np.float32,
            )
            for name, sequence, begin in zip(names, sequences, begins, strict=True)
        ]

    def on_sleep(self) -> None:
        """Weights to the host, the cache away."""
        self._engine.sleep(level=1)

    def on_wake(self) -> None:
        """Back."""
        self._engine.wake_up()

    def _step(self) -> dict[str, Any]:
        """One of vLLM's; the prompt's log-probabilities of sequences that were to be scored, by name."""
        scored = {}
        for output in self._engine.step():
            made = output.outputs[0]
            if output.request_id.startswith("score "):
                scored[output.request_id] = output.prompt_logprobs
                continue
            tokens = list(made.token_ids)
            logprobs = [table[token].logprob for token, table in zip(tokens, made.logprobs, strict=True)]
            key = output.request_id.removeprefix(_name(""))
            self._sampled.append(Sampled(key, tokens, logprobs, self._version, made.finish_reason))
        return scored


def _name(key: str) -> str:
    """A request's name in vLLM, unlike those of sequences to score."""
    return f"request {key}"


def _refuse_experts(folder: str) -> None:
    """vLLM 0.31 packs experts for a CPU when it loads them, and mixes them up when they come again: log-probabilities
    were off by 1 after the very weights that it had."""
    if any(isinstance(layer.mlp, ExpertsConfig) for layer in spec_from_folder(folder).config.layers):
        raise RolloutError(
            "vLLM's CPU build does not take new weights of a mixture of experts",
            where=folder,
            expected="a dense model, or a GPU",
            fix="use the embedded engine",
        )


def _reload(worker: Any, weights: Iterator[tuple[str, Any]]) -> None:
    """In vLLM's worker. ``model.load_weights`` alone does not do on a CPU: layers were packed after loading.

    Nor does vLLM 0.31 pack a tied head again, for no weight comes under its name: it would go on with the old one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    worker.model_runner.reload_weights(weights_iterator=weights)
    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


if __name__ == "__main__":
    # Under its own name, for the driver knows no class of this __main__.
    from posttrain_lib.adapters import vllm_worker

    inbox = Inbox(*map(int, sys.argv[1:]))
    inbox.serve(vllm_worker.Worker(inbox).answer)
