"""Log-probabilities of samples under a model that does not change: an anchor before updates, a reference, a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.data.collate import to_torch
from posttrain_lib.models.spec import can_share_prefixes
from posttrain_lib.ops.allowed_logprobs import allowed_logprobs
from posttrain_lib.parallel.context import own_part
from posttrain_lib.parallel.process_group import gather_objects
from posttrain_lib.rl.packing import PackedSamples, by_sample, pack_samples
from posttrain_lib.training.device import autocast

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.parallel.mesh import RankMesh
    from posttrain_lib.schema.rollouts import TrainSample


@dataclass(frozen=True)
class Scoring:
    """How samples go through a model: the packing's sizes as of ``rl.packing.pack_samples``, the ``temperature`` that
    they were drawn at, and the ``precision`` of the forward (fp32, bf16)."""

    row_tokens: int
    micro_batch_rows: int = 1
    temperature: float = 1.0
    precision: str = "fp32"
    pair_cost: float = 0.0
    share_prefixes: bool = True

    def pack(self, model: Decoder, mesh: RankMesh, samples: Sequence[TrainSample]) -> PackedSamples:
        """This rank's micro-batches; prompts are shared where the model can."""
        longest = max((len(sample.token_ids) for sample in samples), default=1)
        return pack_samples(
            samples,
            row_tokens=self.row_tokens,
            micro_batch_rows=self.micro_batch_rows,
            rank=mesh.data_rank,
            world=mesh.spec.data_degree,
            pair_cost=self.pair_cost,
            share_prefixes=self.share_prefixes and can_share_prefixes(model.config, longest),
        )


@torch.no_grad()
def score_samples(model: Decoder, mesh: RankMesh, samples: Sequence[TrainSample], scoring: Scoring) -> list[np.ndarray]:
    """Float32 [N] for each sample: log-probabilities of its trained tokens, among those that were
    allowed; the same on every rank.

    Raises:
        DataError: a sample does not fit into a row.
    """
    batches = [own_part(batch, mesh) for batch in scoring.pack(model, mesh, samples).micro_batches]
    values = []
    for arrays in batches:
        batch = to_torch(arrays, mesh.device)

        def logprobs(hidden_TD: Tensor, head: OutputHead, batch=batch) -> Tensor:
            index = batch.supervised_index
            targets, temperature = batch.target_ids, scoring.temperature
            return allowed_logprobs(hidden_TD, head, targets, index, batch.allowed, temperature=temperature)[0]

        with autocast(mesh.device, scoring.precision):
            found = model(
                batch.token_ids,
                batch.positions,
                batch.cu_seqlens,
                batch.max_seqlen,
                logprobs,
                prefixes=batch.prefixes,
            )
        values.append(found.float().cpu().numpy())
    here = by_sample(values, batches, len(samples))
    everywhere = {number: found for part in gather_objects(here) for number, found in part.items()}
    return [everywhere[number] for number in range(len(samples))]
