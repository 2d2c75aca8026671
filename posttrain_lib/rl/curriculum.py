"""Which prompts a pass leaves out: those that were answered so well, or so badly, that nothing is to be learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_lib.schema.rollouts import Grade


class Curriculum:
    """Pass rates by prompt, each of its last visit, and what they lead to. The rates go into the checkpoint.

    A prompt that was left out is asked again in the pass behind: what is easy now may be forgotten then.

    Args:
        solved, hopeless: left out where at least (at most) this share of the answers was right; None: never.
    """

    def __init__(self, solved: float | None, hopeless: float | None) -> None:
        self.solved, self.hopeless = solved, hopeless
        self.rates: dict[int, float] = {}
        self._skipped_in_a_row = 0

    def note(self, prompt: int, grades: Sequence[Grade]) -> None:
        """A prompt was answered; where no grader says what is right, nothing follows."""
        known = [grade.correct for grade in grades if grade.correct is not None]
        if known:
            self.rates[prompt] = float(np.mean(known))

    def skips(self, prompt: int, prompts: int) -> str | None:
        """Why a prompt is left out this time, None where it is not.

        At least one of ``prompts`` is never left out: a run that has solved everything goes on asking.
        """
        rate, why = self.rates.get(prompt), None
        if rate is None or self._skipped_in_a_row >= prompts:
            self._skipped_in_a_row = 0
            return None
        if self.solved is not None and rate >= self.solved:
            why = f"{rate:.0%} right at its last visit"
        elif self.hopeless is not None and rate <= self.hopeless:
            why = f"only {rate:.0%} right at its last visit"
        if why is None:
            self._skipped_in_a_row = 0
            return None
        del self.rates[prompt]
        self._skipped_in_a_row += 1
        return why

    def state(self) -> list[tuple[int, float]]:
        """JSON-ready."""
        return sorted(self.rates.items())

    def load_state(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from a checkpoint."""
        self.rates = {int(prompt): rate for prompt, rate in state}
