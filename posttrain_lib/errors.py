"""The errors a user can meet. Each says what, where, got, expected and what to do.

They carry plain strings, so they survive pickling between a Ray worker and its driver.
"""

from __future__ import annotations

#: exit code of a process whose work a plain retry goes on with (EX_TEMPFAIL of sysexits.h)
RETRY_EXIT_CODE = 75


class PosttrainError(Exception):
    """Base of every error that is the user's to act on.

    Args:
        what: one sentence, what is wrong.
        where: file, row, field or module.
        got: the offending value.
        expected: what would have been right.
        fix: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.fix = fix
        parts = [("where", self.where), ("got", self.got), ("expected", self.expected), ("fix", self.fix)]
        details = "".join(f"\n  {name + ':':<10}{value}" for name, value in parts if value is not None)
        super().__init__(what + details)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.got, self.expected, self.fix))


def _rebuild(kind: type[PosttrainError], what: str, where: object, got: object, expected: object, fix: str | None):
    return kind(what, where=where, got=got, expected=expected, fix=fix)


class ConfigError(PosttrainError):
    """A run file that cannot be right: unknown key, impossible value or combination."""


class DataError(PosttrainError):
    """Data that cannot be read, rendered, masked or trained on."""


class ModelError(PosttrainError):
    """A model folder that is incomplete, damaged or of an unsupported architecture."""


class VerificationError(PosttrainError):
    """Two implementations that should agree do not."""


class CheckpointError(PosttrainError):
    """A checkpoint that is torn, corrupt or of another run."""


class TrainingError(PosttrainError):
    """Training that must not go on: non-finite loss, lost worker."""


class PreemptedError(PosttrainError):
    """Training that was asked to stop and did, behind a checkpoint: the same command again goes on from there."""


class RolloutError(PosttrainError):
    """A rollout engine that cannot do what it was asked, or whose weights are not the policy's."""


class StoreError(PosttrainError):
    """The artifact store cannot be written or holds something unexpected."""


class ExportError(PosttrainError):
    """An exported folder that does not prove itself."""
