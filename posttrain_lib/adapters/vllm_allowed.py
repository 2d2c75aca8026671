"""Allowed tokens in vLLM's sampler: a request's constraint masks its logits before the softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.engine.sequences import allowed_ids
from posttrain_lib.schema.rollouts import Request

#: requests whose constraint left nothing to sample, by key: an exception would end vLLM's step for all others
FAILURES: dict[str, RolloutError] = {}


class AllowedTokensProcessor(AdapterLogitsProcessor):
    """Reads the request that stands in its sampling parameters, as ``extra_args["request"]``."""

    def is_argmax_invariant(self) -> bool:
        """Greedy requests are constrained too."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """(tokens sampled so far, logits [V]) -> logits with -inf at what is not allowed; None without a constraint."""
        request: Request | None = (params.extra_args or {}).get("request")
        if request is None or request.allowed is None:
            return None

        def masked(sampled: list[int], logits: Tensor) -> Tensor:
            try:
                ids = allowed_ids(request, sampled, logits.shape[-1])
            except RolloutError as error:
                FAILURES[request.key] = error
                return logits
            if ids is None:
                return logits
            index = torch.as_tensor(ids, device=logits.device)
            return torch.full_like(logits, float("-inf")).index_copy_(0, index, logits[index])

        return masked
