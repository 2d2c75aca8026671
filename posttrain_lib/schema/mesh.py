"""How the ranks of a job are laid out: degrees by axis, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshSpec:
    """Degrees of the mesh's axes; ranks count through the last axis first, so those that talk most stand together.

    ``replicate``: copies of the model that see different rows and average their gradients.
    ``shard``: ranks that share one copy's weights (FSDP2) and see different rows.
    ``context``: ranks that share one row's tokens.
    ``tensor``: ranks that share one token's heads, features and vocabulary.
    ``expert``: ranks that experts are dealt out over; no axis of its own, it takes those of ``shard`` and ``context``.

    Raises:
        ValueError: a degree below 1, or ``expert`` that does not divide ``shard * context``.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        low = [name for name, degree in vars(self).items() if degree < 1]
        if low:
            raise ValueError(f"a mesh needs degrees of at least 1, got {', '.join(low)} below")
        if (self.shard * self.context) % self.expert:
            raise ValueError(
                f"expert ({self.expert}) has to divide shard x context ({self.shard} x {self.context}): experts are "
                "dealt out over those ranks"
            )

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data_degree(self) -> int:
        """Groups of ranks that see different rows."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which of the :attr:`data_degree` groups a rank is in."""
        return rank // (self.context * self.tensor)


#: one rank
SINGLE = MeshSpec()
