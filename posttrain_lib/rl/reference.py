"""The reference's rank: a frozen model over the policy's own ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain_lib.rl.scoring import Scoring, score_samples

if TYPE_CHECKING:
    import numpy as np

    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.parallel.mesh import RankMesh
    from posttrain_lib.schema.rollouts import TrainSample


class FrozenReference:
    """A frozen decoder (``rl.roles.ReferenceRole``), laid over ``mesh`` as the policy is. Every rank calls alike."""

    def __init__(self, model: Decoder, mesh: RankMesh, scoring: Scoring) -> None:
        self.model, self.mesh, self.scoring = model, mesh, scoring

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Float32 [N] for each sample, of its trained tokens."""
        return score_samples(self.model, self.mesh, samples, self.scoring)

    def close(self) -> None:
        """Nothing is held but memory."""
