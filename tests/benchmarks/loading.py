"""Memory and time of loading a Hugging Face folder, by number of ranks, beside transformers in the same run:

    python -m tests.benchmarks.loading --output tests/benchmarks/results/loading.json

Each rank is a process over gloo that lays the decoder over all ranks (FSDP2) and reads its own regions of the files.
Kept are, per rank: the bytes of its share, how much its resident memory rose above what it was before (the peak of
anonymous pages and of mapped file pages together, sampled), and the seconds of reading alone, into parameters whose
memory is there. The measure of it is ``raw readinto``: one process that reads the files into memory that is there.
``cold``: the files are dropped from the page cache before. ``warm``: they are read once before. Medians of interleaved
rounds.

With ``--store`` each number of ranks also reads the same files from an S3 server on loopback (moto's, behind a proxy,
in a process of their own); kept is, besides, how many bytes a rank fetched for each byte of its share.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from posttrain_lib.schema.mesh import MeshSpec
from tests.benchmarks.machine import Resident, out_of_cache
from tests.benchmarks.recording import Recording, argument_parser

MIB = 1 << 20
#: the shape of a Qwen3 of 0.5 G parameters: a rank's share is large beside the buffers of reading
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_folder(folder: Path) -> int:
    """Random bfloat16 weights in several shards; returns their bytes."""
    import torch

    from posttrain_lib.checkpoint.hf import save_hf_folder
    from posttrain_lib.models.families import spec_from_config
    from posttrain_lib.models.scratch import initial_weights

    spec, source = spec_from_config(CONFIG), folder / "source"
    source.mkdir(parents=True)
    save_hf_folder(
        dict(initial_weights(spec, 0)), spec, source, folder / "model", torch.bfloat16, max_shard_bytes=128 * MIB
    )
    return sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))


def ours(folder: str, source: str, rank: int, world: int, port: int) -> dict[str, float]:
    """One rank: lay out on the meta device, allocate, load. ``folder`` has the config; ``source`` the weights."""
    import torch

    from posttrain_lib.checkpoint.hf import load_hf_weights, local_block
    from posttrain_lib.data.remote import RemoteObject
    from posttrain_lib.models.decoder import build_model
    from posttrain_lib.models.families import spec_from_folder
    from posttrain_lib.parallel.apply import apply_parallelism
    from posttrain_lib.parallel.mesh import rank_mesh
    from posttrain_lib.parallel.process_group import process_group

    torch.set_num_threads(1)
    device = torch.device("cpu")
    fetched, fetch = [], RemoteObject.fetch

    def counting(self: RemoteObject, start: int, end: int, stop: threading.Event) -> bytearray:
        fetched.append(end - start)
        return fetch(self, start, end, stop)

    RemoteObject.fetch = counting  # type: ignore[method-assign]
    with process_group(rank, world, f"127.0.0.1:{port}", device):
        spec = spec_from_folder(folder)
        model = build_model(spec, dtype=torch.bfloat16, device="meta")
        apply_parallelism(model, mesh=rank_mesh(MeshSpec(shard=world), device), activation_checkpointing="none")
        with Resident() as resident:
            model.to_empty(device=device)
            for parameter in model.parameters():
                local_block(parameter.detach())[0].fill_(0.0)  # its pages are there from now on
            begun = time.perf_counter()
            load_hf_weights(model, spec, source)
            seconds = time.perf_counter() - begun
        share = sum(local_block(parameter)[0].nbytes for parameter in model.parameters())
    figures = {"share_mib": share / MIB, "rise_mib": resident.rise / MIB, "seconds": seconds}
    return figures | ({"fetched_over_share": sum(fetched) / share} if fetched else {})


def transformers_alone(folder: str) -> dict[str, float]:
    """The peer: from_pretrained in one process, in the files' dtype."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with Resident() as resident:
        begun = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        seconds = time.perf_counter() - begun
    share = sum(parameter.nbytes for parameter in model.parameters())
    return {"share_mib": share / MIB, "rise_mib": resident.rise / MIB, "seconds": seconds}


def raw_readinto(folder: str) -> dict[str, float]:
    """The measure: every file read whole into memory whose pages are there."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    memory = memoryview(bytearray(max(path.stat().st_size for path in paths)))
    memory[:] = bytes(len(memory))
    begun = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as handle:
            at, size = 0, path.stat().st_size
            while at < size:
                at += handle.readinto(memory[at:size])
    return {"seconds": time.perf_counter() - begun}


def prepare_cache(folder: str, cold: bool) -> None:
    """The files out of the page cache, or in it."""
    if cold:
        out_of_cache(Path(folder))
        return
    for path in Path(folder).glob("*.safetensors"):
        path.read_bytes()


def in_processes(
    count: int, run: Any, folder: str, source: str | None = None, *, cold: bool = False
) -> list[dict[str, float]]:
    """``run(folder, ...)`` in fresh processes, one a rank."""
    prepare_cache(folder, cold)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        own = [[source or folder, rank, count, port] if run is ours else [] for rank in range(count)]
        ranks = [pool.submit(run, folder, *arguments) for arguments in own]
        return [rank.result() for rank in ranks]


@contextlib.contextmanager
def in_store(folder: str) -> Iterator[str]:
    """The URL of the folder's files in an S3 server, which the environment names meanwhile."""
    from tests.support.s3 import s3_client, s3_environment, s3_process

    with s3_process() as (server, proxy), s3_environment(proxy):
        client = s3_client(server)
        client.mkdir("hub")
        for path in Path(folder).iterdir():
            client.put_file(str(path), f"hub/model/{path.name}")
        yield "s3://hub/model"


def worst(ranks: list[dict[str, float]]) -> dict[str, float]:
    """The rank that took the most memory and the one that took the longest."""
    if "rise_mib" not in ranks[0]:
        return ranks[0]
    top = max(ranks, key=lambda rank: rank["rise_mib"])
    return {**top, "rise_over_share": top["rise_mib"] / top["share_mib"], "seconds": max(r["seconds"] for r in ranks)}


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--store", action="store_true", help="also from an S3 server on loopback")
    options = parser.parse_args()
    recording = Recording()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        size = write_folder(Path(temporary))
        folder = str(Path(temporary) / "model")
        url = stack.enter_context(in_store(folder)) if options.store else None
        for _ in range(options.rounds):
            for cold, state in ((True, "cold"), (False, "warm")):
                for name, run in (("raw readinto", raw_readinto), ("transformers", transformers_alone)):
                    one = worst(in_processes(1, run, folder, cold=cold))
                    found.setdefault(f"{name}, 1 process, {state}", []).append(one)
                for world in options.ranks:
                    ranks = worst(in_processes(world, ours, folder, cold=cold))
                    found.setdefault(f"ours, {world} ranks, {state}", []).append(ranks)
            for world in options.ranks:
                if url is not None:
                    from_store = worst(in_processes(world, ours, folder, url))
                    found.setdefault(f"ours, {world} ranks, from S3", []).append(from_store)
    medians = {
        name: {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}
        for name, rounds in found.items()
    }
    figures = {
        "model_mib": round(size / MIB, 1),
        "rounds": options.rounds,
        "medians_of_the_worst_rank": medians,
        "rate_over_raw_readinto": {
            name: round(medians[f"raw readinto, 1 process, {state}"]["seconds"] / figures["seconds"], 3)
            for name, figures in medians.items()
            for state in ("cold", "warm")
            if name.startswith("ours") and name.endswith(state)
        },
    }
    print(json.dumps(figures, indent=1))
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
