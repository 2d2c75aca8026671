"""From a job to its objects: the model over the ranks, the data of one rank, the number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.live_feed import LiveFeed
from posttrain_lib.data.loader import PackedLoader, count_steps
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.hf_decoder import as_decoder, load_hf_decoder
from posttrain_lib.models.hf_spec import HFSpec, check_workers, hf_spec_from_folder
from posttrain_lib.models.lora import LoraDecoder, apply_lora, init_adapters
from posttrain_lib.models.score import init_score_head, with_score_head
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.parallel.apply import apply_parallelism

if TYPE_CHECKING:
    from posttrain_lib.config.train import TrainConfig
    from posttrain_lib.data.live_feed import LiveSpec
    from posttrain_lib.data.planner import Feed
    from posttrain_lib.data.store_feed import StoreFeed
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.parallel.mesh import RankMesh
    from posttrain_lib.training.job import TrainJob


def spec_of(job: TrainJob) -> ModelSpec | HFSpec:
    """What the job's model is."""
    if job.backend == "hf":
        check_workers(job.world)
        return hf_spec_from_folder(job.model_folder)
    spec = with_padded_vocabulary(spec_from_folder(job.model_folder), job.pad_vocabulary_to)
    return spec if job.score_padding is None else with_score_head(spec, job.score_padding)


def load_sharded_model(spec: ModelSpec | HFSpec, job: TrainJob, mesh: RankMesh) -> Decoder:
    """The model, laid over the ranks before its weights are read: no rank holds more than its share and one tensor.

    A class of transformers is loaded whole: it runs in one rank."""
    if isinstance(spec, HFSpec):
        model = as_decoder(load_hf_decoder(spec, job.model_folder, mesh.device))
        return apply_parallelism(
            model,
            mesh=mesh,
            activation_checkpointing=job.train.activation_checkpointing,
            compilation=job.train.compile,
        )
    dtype = torch.float32 if job.lora is None else getattr(torch, job.lora.base_dtype)
    model = build_model(spec, dtype, device="meta" if job.world > 1 else mesh.device)
    if job.lora is not None:
        model = apply_lora(model, job.lora)
    apply_parallelism(
        model,
        mesh=mesh,
        activation_checkpointing=job.train.activation_checkpointing,
        compilation=job.train.compile,
        offload=job.offload,
    )
    if job.world > 1:
        model.to_empty(device="cpu" if job.offload == "parameters" else mesh.device)
    load_hf_weights(model, spec, job.model_folder)
    init_score_head(model, spec, job.train.seed)
    if job.lora is not None and isinstance(model, LoraDecoder):
        init_adapters(model, job.lora.seed)
    return model


def live_feed(spec: LiveSpec, job: TrainJob) -> LiveFeed:
    """The units of rows that are tokenised as training goes; the first rank keeps the refused ones."""
    config = job.train
    assert config.shuffle_window is not None, "the config demands a window for rows that are read in sequence"
    return LiveFeed(
        spec,
        row_tokens=config.row_tokens,
        window=config.shuffle_window,
        seed=config.seed,
        epochs=None if config.epochs is None else int(config.epochs),
        share_prefixes=config.share_prefixes,
        mixture=config.mixture,
        workers=job.loader_workers if job.loader_workers > 1 else 0,
        quarantine=Path(job.work_dir) if job.rank == 0 else None,
    )


def build_loader(
    feed: Feed, config: TrainConfig, *, rank: int = 0, world: int = 1, pair_cost: float = 0.0, background: bool = True
) -> PackedLoader:
    """The training data of one rank."""
    return PackedLoader(
        feed,
        row_tokens=config.row_tokens,
        rows_per_step=config.rows_per_step,
        micro_batch_rows=config.micro_batch_rows,
        packing_buffer=config.packing_buffer,
        rank=rank,
        world=world,
        pair_cost=pair_cost,
        background=background,
    )


def planned_steps(feed: StoreFeed, config: TrainConfig) -> int:
    """Optimiser steps of the whole run: as configured, or as many as there are until the data ends.

    ``feed`` stands at its beginning, before and after.
    """
    if config.steps is None and not feed.mixer.ends():
        raise ConfigError(
            "the mixture never ends: its sources repeat, or are no longer drawn when one should stop it",
            where="train.steps",
            expected="a number of steps, or another train.mixture 'exhausted'",
        )
    if config.steps is not None and not feed.mixer.may_end():
        return config.steps  # nothing to count
    return count_steps(
        feed,
        row_tokens=config.row_tokens,
        rows_per_step=config.rows_per_step,
        packing_buffer=config.packing_buffer,
        most=config.steps,
    )
