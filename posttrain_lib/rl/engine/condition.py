"""What an engine refuses because of the state that it is in, whoever made it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from posttrain_lib.errors import RolloutError


class Condition(ABC):
    """An engine's: open until it is closed, and usable but between a push that failed and the next good one, when some
    of its weights are new and some old. For engines (``rl.roles.RolloutRole``) to inherit."""

    _closed = False
    #: why it does not work; None: it does
    _unusable: str | None = None

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Requests that were submitted and have not come back."""

    def _check_open(self) -> None:
        """Raises RolloutError once the engine is closed."""
        if self._closed:
            raise RolloutError("the engine was closed", fix="make a new one")

    def _check_usable(self) -> None:
        """Raises RolloutError where the engine is closed, or has no whole weights."""
        self._check_open()
        if self._unusable is not None:
            raise RolloutError("the engine does not work", got=self._unusable, fix="push all weights of a good version")

    def _check_may_sleep(self) -> None:
        """Raises RolloutError where the engine is closed, or has work to do."""
        self._check_open()
        if self.unfinished:
            raise RolloutError(
                "an engine with work to do cannot sleep",
                got=f"{self.unfinished} unfinished requests",
                fix="step until none is left, or abort them",
            )
