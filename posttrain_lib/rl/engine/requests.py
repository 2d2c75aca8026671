"""What an engine asks of requests and sequences before it takes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from posttrain_lib.errors import RolloutError
from posttrain_lib.schema.rollouts import Request


def check_requests(
    requests: Sequence[Request], known: Collection[str], *, window: int, vocab_size: int, has_text: bool
) -> None:
    """Refuse requests that an engine cannot serve, before any of them is taken.

    Args:
        known: keys that are in the engine already.
        window: tokens of prompt and completion together.
        has_text: whether the engine can make text of tokens, which stop strings need.

    Raises:
        RolloutError: naming the request.
    """
    seen = set(known)
    for request in requests:
        where, sampling = f"request {request.key}", request.sampling
        if request.key in seen:
            raise RolloutError(
                "a request's key is in the engine already", where=where, fix="give every request a key of its own"
            )
        seen.add(request.key)
        _check_tokens(request.prompt_ids, vocab_size, where)
        if len(request.prompt_ids) >= window:
            raise RolloutError(
                "a prompt leaves no room for an answer",
                where=where,
                got=f"{len(request.prompt_ids)} tokens",
                expected=f"fewer than the engine's window of {window}",
                fix="leave out prompts that long, or make the engine's window larger",
            )
        if sampling.max_new_tokens < 1 or not 0 <= sampling.temperature < math.inf or not 0 <= request.seed < 2**64:
            raise RolloutError(
                "a request cannot be sampled like this",
                where=where,
                got=f"max_new_tokens {sampling.max_new_tokens}, temperature {sampling.temperature}, "
                f"seed {request.seed}",
                expected="at least 1 token, a temperature of 0 or more, a seed from 0 to 2**64 - 1",
            )
        if "" in sampling.stop_strings or (sampling.stop_strings and not has_text):
            raise RolloutError(
                "a request's stop strings cannot be looked for",
                where=where,
                got=sampling.stop_strings,
                expected="strings that are not empty, and an engine that was given a tokenizer's decode",
            )


def check_sequences(sequences: Sequence[Sequence[int]], begins: Sequence[int], *, window: int, vocab_size: int) -> None:
    """Refuse what ``logprobs`` cannot score.

    Raises:
        RolloutError: naming the sequence.
    """
    if len(begins) != len(sequences):
        raise RolloutError(f"{len(sequences)} sequences need a beginning each", got=len(begins))
    for number, (sequence, begin) in enumerate(zip(sequences, begins, strict=True)):
        where = f"sequence {number}"
        _check_tokens(sequence, vocab_size, where)
        if len(sequence) > window or begin < 1:
            raise RolloutError(
                "a sequence cannot be scored",
                where=where,
                got=f"{len(sequence)} tokens, from {begin} on",
                expected=f"at most the engine's window of {window} tokens, from 1 or later on",
            )


def _check_tokens(tokens: Sequence[int], vocab_size: int, where: str) -> None:
    if len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        raise RolloutError(
            "tokens that the model cannot read",
            where=where,
            got=f"{len(tokens)} tokens, of which are no ids: {wrong[:8]}",
            expected=f"at least one token, each from 0 to {vocab_size - 1}",
            fix="tokenise with the model's own tokenizer",
        )
