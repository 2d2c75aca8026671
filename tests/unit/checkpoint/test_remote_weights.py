"""A model in an object store is read by byte ranges, straight into the parameters, as it would be from a disk."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import (
    check_hf_folder,
    iter_hf_weights,
    load_hf_weights,
    local_block,
    save_hf_folder,
)
from posttrain_lib.checkpoint.hf_files import INDEX_FILE, WEIGHTS_FILE, StoredTensors, read_headers
from posttrain_lib.checkpoint.remote_folder import fetch_folder, pinned_files
from posttrain_lib.checkpoint.verify import verify_model
from posttrain_lib.checkpoint.weight_files import AT_A_TIME, POINTER, StoreFiles, need_local
from posttrain_lib.data import remote
from posttrain_lib.errors import DataError, ModelError
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.growth import grow_folder
from posttrain_lib.models.growth_tokenizer import NewToken
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.s3 import s3_client, s3_environment, s3_server
from tests.support.tiny_models import write_tiny_model

#: sizes at which a tensor is many times what a header takes
SIZES = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
RANKS = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "single": one file; "sharded": the same model in many, with an index."""
    root = tmp_path_factory.mktemp("models")
    single = write_tiny_model("llama", root / "single", **SIZES)
    (single / "tokenizer_config.json").write_text('{"note": "a small file"}')
    (single / "templates").mkdir()
    (single / "templates" / "tool.jinja").write_bytes(b"{{ x }}")
    spec = spec_from_folder(single)
    save_hf_folder(
        dict(iter_hf_weights(spec, single)), spec, single, root / "sharded", "float32", max_shard_bytes=90_000
    )
    return {"single": single, "sharded": root / "sharded"}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[tuple[FaultyProxy, Any]]:
    """A proxy before an S3 server with both models, and a client that goes round the proxy."""
    with s3_server() as url, faulty_proxy(url) as proxy, s3_environment(proxy.url):
        client = s3_client(url)
        client.mkdir("hub")
        for name, folder in folders.items():
            _upload(client, folder, f"hub/{name}")
        yield proxy, client


def _upload(client: Any, folder: Path, target: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.pipe(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture
def proxy(server: tuple[FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """The proxy without faults, and little patience."""
    patience = remote.Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02)
    monkeypatch.setattr(remote, "PATIENCE", patience)
    server[0].reset()
    return server[0]


def _loaded(folder: Path, source: str | Path) -> dict[str, Tensor]:
    spec = spec_from_folder(folder)
    model = build_model(spec)
    load_hf_weights(model, spec, source)
    return dict(model.state_dict())


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["single", "sharded"])
@pytest.mark.parametrize("at_a_time", [AT_A_TIME, 10_000])
def test_loading_from_a_store_gives_the_bits_of_the_disk(name, at_a_time, folders, proxy, monkeypatch):
    local = _loaded(folders[name], folders[name])
    monkeypatch.setattr("posttrain_lib.checkpoint.hf_files.AT_A_TIME", at_a_time)
    assert _same(_loaded(folders[name], f"s3://hub/{name}/"), local)
    # Regions that touch are one range, none is asked for twice, and none is longer than it may be.
    asked = [seen for seen in proxy.seen if seen.method == "GET" and seen.key.endswith(".safetensors")]
    ranges = [seen.end - seen.start for seen in asked if seen.start is not None and seen.end is not None]
    assert len(ranges) == len(asked)
    assert max(ranges) <= at_a_time
    assert sum(ranges) == sum(path.stat().st_size for path in folders[name].glob("*.safetensors"))
    if at_a_time == AT_A_TIME:  # the length of a header, the header, and everything behind it
        assert len(ranges) == 3 * len(list(folders[name].glob("*.safetensors")))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_stores_are_read_alike(scheme, folders):
    folder, memory = folders["sharded"], fsspec.filesystem("memory")
    for path in folder.glob("*"):
        if path.is_file():
            memory.pipe(f"/hub/model/{path.name}", path.read_bytes())
    url = f"file://{folder}" if scheme == "file" else "memory://hub/model"
    assert _same(_loaded(folder, url), _loaded(folder, folder))


def test_cut_connections_and_errors_cost_time_only(folders, proxy):
    proxy.faults += [
        Fault(2, after_bytes=5_000, key=WEIGHTS_FILE, from_byte=8),
        Fault(1, after_bytes=0, key=WEIGHTS_FILE),
        Fault(2, status=503, key=WEIGHTS_FILE),
        Fault(1, status=500, key=WEIGHTS_FILE, method="HEAD"),
    ]
    assert _same(_loaded(folders["single"], "s3://hub/single"), _loaded(folders["single"], folders["single"]))
    assert not any(fault.times for fault in proxy.faults)


def test_a_store_that_keeps_failing_is_named(folders, proxy):
    proxy.faults.append(Fault(1000, status=503, key=WEIGHTS_FILE, from_byte=8))
    with pytest.raises(DataError, match="kept failing") as caught:
        _loaded(folders["single"], "s3://hub/single")
    assert caught.value.where == f"s3://hub/single/{WEIGHTS_FILE}"


def test_what_the_store_refuses_is_named(folders, proxy):
    proxy.faults.append(Fault(1000, status=403, key=WEIGHTS_FILE, method="HEAD"))
    with pytest.raises(ModelError, match="cannot be read from its store") as caught:
        _loaded(folders["single"], "s3://hub/single")
    assert caught.value.where == f"s3://hub/single/{WEIGHTS_FILE}"


def test_a_missing_shard_is_named(folders, server, proxy):
    _, client = server
    _upload(client, folders["sharded"], "hub/incomplete")
    lost = sorted(path.name for path in folders["sharded"].glob("*.safetensors"))[1]
    client.rm_file(f"hub/incomplete/{lost}")
    with pytest.raises(ModelError, match="a file of the model is missing") as caught:
        read_headers("s3://hub/incomplete")
    assert caught.value.where == f"s3://hub/incomplete/{lost}"


def test_weights_of_another_format_are_refused_with_the_command_that_converts_them(server, proxy):
    _, client = server
    client.pipe("hub/old/config.json", b"{}")
    client.pipe("hub/old/pytorch_model.bin", b"PK")
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        read_headers("s3://hub/old")
    assert caught.value.got == "pytorch_model.bin"
    assert "save_pretrained('old-safetensors')" in str(caught.value.fix)
    with pytest.raises(ModelError, match="does not exist"):
        pinned_files("s3://hub/nothing")


def _rank(folders: dict[str, Path], rank: int, port: int) -> dict[str, tuple[dict[str, Any], int]]:
    """One of two ranks under FSDP2: source -> (name -> (where its block begins, the block), bytes that it fetched)."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    fetched, fetch = [], remote.RemoteObject.fetch

    def counting(self: Any, start: int, end: int, stop: Any) -> bytearray:
        fetched.append(end - start)
        return fetch(self, start, end, stop)

    remote.RemoteObject.fetch = counting  # type: ignore[method-assign]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    found = {}
    try:
        for source, folder in folders.items():
            fetched.clear()
            spec = spec_from_folder(folder)
            model = build_model(spec, device="meta")
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
            model.to_empty(device="cpu")
            load_hf_weights(model, spec, f"s3://hub/{source}")
            blocks = {name: local_block(value) for name, value in model.named_parameters()}
            own = {name: (begin, block.detach().clone()) for name, (block, begin) in blocks.items()}
            found[source] = own, sum(fetched)
    finally:
        dist.destroy_process_group()
    return found


def test_a_rank_reads_the_bytes_of_its_own_share_and_no_other(folders, proxy):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(RANKS, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, folders, rank, port) for rank in range(RANKS)]
        found = [rank.result() for rank in ranks]
    for name, folder in folders.items():
        _check_shares(name, folder, [rank[name] for rank in found], proxy)


def _check_shares(name: str, folder: Path, found: list[tuple[dict[str, Any], int]], proxy: FaultyProxy) -> None:
    whole, headers = _loaded(folder, folder), 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as handle:
            headers += 8 + int.from_bytes(handle.read(8), "little")
    if name == "sharded":
        headers += (folder / INDEX_FILE).stat().st_size
    size = sum(value.nbytes for value in whole.values())
    for blocks, fetched in found:
        share = sum(block.nbytes for _, block in blocks.values())
        assert fetched == share + headers
        assert share == pytest.approx(size / RANKS, rel=0.01)
        for parameter, (begin, block) in blocks.items():
            here = tuple(slice(first, first + count) for first, count in zip(begin, block.shape, strict=True))
            assert torch.equal(block, whole[parameter][here])
    sent = sum(count for key, count in proxy.sent.items() if key.startswith(f"hub/{name}/"))
    assert sent == sum(fetched for _, fetched in found)


@pytest.fixture
def pointing(folders, proxy, tmp_path) -> Path:
    """The sharded model as a folder with a pointer to its weights."""
    fetch_folder("s3://hub/sharded", pinned_files("s3://hub/sharded"), tmp_path / "model")
    return tmp_path / "model"


def test_a_fetched_folder_has_the_small_files_and_no_weights(folders, pointing, proxy):
    names = {path.relative_to(pointing).as_posix() for path in pointing.rglob("*") if path.is_file()}
    assert names == {"config.json", "generation_config.json", "tokenizer_config.json", "templates/tool.jinja", POINTER}
    for name in names - {POINTER}:
        assert (pointing / name).read_bytes() == (folders["sharded"] / name).read_bytes()
    assert not proxy.ranges(".safetensors")
    pointed = json.loads((pointing / POINTER).read_text())
    assert pointed["url"] == "s3://hub/sharded"
    shards = {path.name for path in folders["sharded"].glob("*.safetensors")}
    assert set(pointed["files"]) == shards | {INDEX_FILE}
    assert all(set(pin) == {"size", "ETag"} for pin in pointed["files"].values())


@pytest.mark.parametrize("key", ["{out}/../planted.json", "hub/leading/{out}/planted.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(key, proxy, server, tmp_path):
    _, client = server
    client.pipe("hub/leading/config.json", b"{}")
    if key.startswith("hub"):
        client.pipe(key.format(out=tmp_path), b"planted")
        pins = pinned_files("s3://hub/leading")
    else:
        pins = {key.format(out="down"): {"size": 7}}
    with pytest.raises(ModelError, match="leads out of its folder"):
        fetch_folder("s3://hub/leading", pins, tmp_path / "model")
    assert not list(tmp_path.rglob("planted.json"))


def test_everything_that_reads_weights_follows_the_pointer(folders, pointing, tmp_path):
    local = folders["sharded"]
    assert _same(dict(load_model(pointing).state_dict()), dict(load_model(local).state_dict()))
    spec = spec_from_folder(pointing)
    assert _same(dict(iter_hf_weights(spec, pointing)), dict(iter_hf_weights(spec, local)))
    here, there = StoredTensors(local), StoredTensors(pointing)
    assert _same({name: here.read(name) for name in here.entries}, {name: there.read(name) for name in there.entries})
    save_hf_folder(load_model(pointing).state_dict(), spec, pointing, tmp_path / "out", "float32")
    assert not (tmp_path / "out" / POINTER).exists()
    assert (tmp_path / "out" / "templates" / "tool.jinja").is_file()
    assert _same(dict(load_model(tmp_path / "out").state_dict()), dict(load_model(local).state_dict()))


@pytest.mark.parametrize("tier", ["light", "blocks"])
def test_the_gate_compares_with_transformers_without_a_copy_on_disk(tier, pointing):
    before = {path for path in pointing.rglob("*")}
    report = verify_model(pointing, tier=tier)
    assert report.passed, report
    assert set(pointing.rglob("*")) == before
    assert all("ETag" in value for name, value in report.files.items() if name.endswith(".safetensors"))


def test_a_whole_folder_in_a_store_is_checked(pointing, server):
    found = check_hf_folder(pointing)
    assert len(found["config.json"]) == 64  # sha256
    assert {name for name in found if name.endswith(".safetensors")} == {
        name for name in StoreFiles("s3://hub/sharded").names() if name.endswith(".safetensors")
    }


def test_a_file_that_was_replaced_is_refused_by_name(folders, pointing, server, tmp_path):
    _, client = server
    _upload(client, folders["sharded"], "hub/moving")
    fetch_folder("s3://hub/moving", pinned_files("s3://hub/moving"), tmp_path / "moving")
    replaced = sorted(path.name for path in folders["sharded"].glob("*.safetensors"))[2]
    other = bytearray((folders["sharded"] / replaced).read_bytes())
    other[-1] ^= 1
    client.pipe(f"hub/moving/{replaced}", bytes(other))
    with pytest.raises(ModelError, match="was replaced in its store") as caught:
        load_model(tmp_path / "moving")
    assert caught.value.where == f"s3://hub/moving/{replaced}"


def test_a_file_that_is_replaced_between_two_ranges_is_refused(folders, server, proxy):
    _, client = server
    _upload(client, folders["single"], "hub/torn")
    stored = StoredTensors("s3://hub/torn")
    other = bytearray((folders["single"] / WEIGHTS_FILE).read_bytes())
    other[-1] ^= 1
    client.pipe(f"hub/torn/{WEIGHTS_FILE}", bytes(other))
    with pytest.raises(DataError, match="replaced while it was read"):
        stored.read("model.norm.weight")


def test_a_broken_pointer_is_refused(pointing):
    (pointing / POINTER).write_text('{"files": {}}')
    with pytest.raises(ModelError, match="says where the weights are"):
        read_headers(pointing)


@pytest.fixture
def tokenized(tmp_path) -> Path:
    """A model with a tokenizer whose vocabulary can grow, in two shards."""
    from posttrain_lib.embedded.conversations import generate_rows
    from posttrain_lib.embedded.tokenizer import build_tokenizer
    from posttrain_lib.models.scratch import write_scratch_model

    texts = (message["content"] for row in generate_rows(40, 0) for message in row["messages"])
    build_tokenizer(texts, 320, tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    write_scratch_model(
        "qwen3", {**sizes, "num_key_value_heads": 1, "head_dim": 8}, tmp_path / "tokenizer", 0, tmp_path / "whole"
    )
    spec = spec_from_folder(tmp_path / "whole")
    state = dict(iter_hf_weights(spec, tmp_path / "whole"))
    save_hf_folder(state, spec, tmp_path / "whole", tmp_path / "new", "float32", max_shard_bytes=24_000)
    return tmp_path / "new"


def test_a_model_in_a_store_grows_as_one_on_disk(tokenized, server, proxy, tmp_path):
    _, client = server
    _upload(client, tokenized, "hub/growing")
    fetch_folder("s3://hub/growing", pinned_files("s3://hub/growing"), tmp_path / "pointing")
    tokens = [NewToken("<|item|>", True), NewToken("<item_0>", False, "a number")]
    for source, out in ((tokenized, "local"), (tmp_path / "pointing", "remote")):
        grow_folder(source, tmp_path / out, tokens, initialise="mean", noise=1e-5, seed=0)
    written = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir() if path.is_file()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "remote").iterdir() if path.is_file()}
    assert INDEX_FILE in written


def test_what_reads_weights_elsewhere_asks_for_a_local_folder(folders, pointing):
    need_local(folders["single"], "of a test")
    with pytest.raises(ModelError, match="because of a test") as caught:
        need_local(pointing, "of a test")
    assert caught.value.got == "s3://hub/sharded"


def test_a_copied_folder_with_a_pointer_is_the_same_model(pointing, tmp_path):
    shutil.copytree(pointing, tmp_path / "copy")
    assert read_headers(tmp_path / "copy") == read_headers(pointing)
