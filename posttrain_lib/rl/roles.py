"""The roles that the controller knows, and nothing of who plays them: this process, Ray actors, vLLM, a scorer.

    policy     trains, says log-probabilities, gives its weights away, keeps checkpoints
    rollout    completes prompts with the weights that it was last given
    reward     grades answers
    reference  says the log-probabilities of a frozen model (also a teacher's)

Every call blocks until its result is there; the controller runs those that may overlap in threads of its own. Contract
tests: ``tests/contracts``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from posttrain_lib.schema.reports import StepReport, TrainResult
    from posttrain_lib.schema.rollouts import Answer, Completion, Grade, Request, TrainSample

#: weights by their Hugging Face names, of the shapes and dtypes of a saved folder; read once, in order
Weights = Iterable[tuple[str, "Tensor"]]


class RolloutRole(Protocol):
    """An engine with continuous batching: requests go in at any time, completions come out as they end."""

    version: int

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests; they are worked on by :meth:`step`.

        Raises:
            RolloutError: a key that is in the engine already, a prompt that leaves no room in the window.
        """

    def step(self) -> list[Completion]:
        """Work on what was submitted, for a token or a few; the completions that ended. Empty requests: at once."""

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not come back."""

    def abort(self, keys: Iterable[str] | None = None) -> list[Completion]:
        """End these requests, None: all, and give what they have. Keys that are not in the engine are left out."""

    def push(self, weights: Weights, version: int) -> str:
        """Take new weights between two steps; unfinished requests go on with them, from what they have.

        Returns:
            The digest of the tensors as received (``rl.sync_guard.digest_of``).

        Raises:
            RolloutError: a name or shape that the engine does not have, or a weight of its own that was left out.
        """

    def logprobs(self, sequences: Sequence[Sequence[int]], begins: Sequence[int]) -> list[np.ndarray]:
        """Float32 log-probabilities, at temperature 1, of each sequence's tokens from ``begins`` (1 or more) on."""

    def sleep(self) -> None:
        """Give device memory away until :meth:`wake`, where the engine can; nothing may be unfinished."""

    def wake(self) -> None:
        """Come back; the weights are those from before."""

    def close(self) -> None:
        """Give everything up. Further calls are errors."""


class PolicyRole(Protocol):
    """The model that learns."""

    @property
    def version(self) -> int:
        """Its updates so far; 0 is the model that training starts from."""

    def resume(self) -> tuple[dict[str, Any], StepReport] | None:
        """Go to the newest good checkpoint: (the controller's state, the report) that were saved with it; None where
        there is none."""

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        """One optimiser step on these samples; ``version`` is then one more."""

    def logprobs(self, samples: Sequence[TrainSample], *, temperature: float | None = None) -> list[np.ndarray]:
        """Float32 [N] for each sample: log-probabilities of its trained tokens; at the temperature of sampling where
        none is named."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`RolloutRole.push` takes. The tensors may be views: read each before the next."""

    def save(self, controller: dict[str, Any], report: StepReport, *, wait: bool = False) -> None:
        """A checkpoint of the policy together with the controller's state, one as old as the other. The report's
        held-out value, where it has one, decides which checkpoint is the best: the lowest. ``wait``: until it is
        there; otherwise it may be written while the next rollouts are made."""

    def result(self) -> TrainResult:
        """What the run came to: its last checkpoint, which is saved, and its best one. How it began, the controller
        knows."""

    def close(self) -> None:
        """Wait for what is being written, and give everything up."""


class ReferenceRole(Protocol):
    """A frozen model beside the policy."""

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """As :meth:`PolicyRole.logprobs`."""

    def close(self) -> None:
        """Give everything up."""


class RewardRole(Protocol):
    """Grades answers, each whatever happens to the others: a grader that hangs, dies or lies costs its answer only."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """One grade for each answer, in order. Never raises for what a grader does."""

    def close(self) -> None:
        """End every process that grades."""
