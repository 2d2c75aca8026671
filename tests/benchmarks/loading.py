"""Memory and time of loading a Hugging Face folder, by number of ranks, beside transformers in the same run:

    python -m tests.benchmarks.loading --output tests/benchmarks/results/loading.json

Each rank is a process over gloo that lays the decoder over all ranks (FSDP2) and reads its own regions of the files.
Kept are, per rank: the bytes of its share, how much its resident memory rose above what it was before (the peak of
anonymous pages and of mapped file pages together, sampled), and the seconds of reading alone. The files are in the
page cache for everybody: each round reads them once before. Medians of interleaved rounds.

With ``--store`` each number of ranks also reads the same files from an S3 server on loopback (moto's, behind a proxy,
in a process of their own); kept is, besides, how many bytes a rank fetched for each byte of its share.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
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
from tests.benchmarks.recording import Recording, argument_parser

MIB = 1 << 20
#: the shape of a Qwen3 of about 0.2 G parameters: large beside what a process of torch takes by itself
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


class Resident:
    """Largest rise of this process's resident memory while inside, in bytes."""

    def __enter__(self) -> Resident:
        self._before, self.rise, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.rise = max(self.rise, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
            begun = time.perf_counter()
            model.to_empty(device=device)
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


def in_processes(count: int, run: Any, folder: str, source: str | None = None) -> list[dict[str, float]]:
    """``run(folder, ...)`` in fresh processes, one a rank; the files are read once before."""
    for path in Path(folder).glob("*.safetensors"):
        path.read_bytes()
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
    top = max(ranks, key=lambda rank: rank["rise_mib"])
    return {**top, "rise_over_share": top["rise_mib"] / top["share_mib"], "seconds": max(r["seconds"] for r in ranks)}


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
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
            found.setdefault("transformers, 1 process", []).append(worst(in_processes(1, transformers_alone, folder)))
            for world in options.ranks:
                found.setdefault(f"ours, {world} ranks", []).append(worst(in_processes(world, ours, folder)))
                if url is not None:
                    from_store = worst(in_processes(world, ours, folder, url))
                    found.setdefault(f"ours, {world} ranks, from S3", []).append(from_store)
    figures = {
        "model_mib": round(size / MIB, 1),
        "rounds": options.rounds,
        "medians_of_the_worst_rank": {
            name: {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}
            for name, rounds in found.items()
        },
    }
    print(json.dumps(figures, indent=1))
    recording.write(options.output, figures)


if __name__ == "__main__":
    main()
