"""An S3 server on loopback (moto's), in this process or one of its own, and the environment in which s3fs finds it."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.support.faulty_proxy import faulty_proxy


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        # What an earlier server of this process stored is still there.
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        yield url
    finally:
        server.stop()


@contextmanager
def s3_environment(url: str) -> Iterator[None]:
    """``s3://`` means the server at ``url``, for every client that reads the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield
        fsspec.filesystem("s3").clear_instance_cache()


def s3_client(url: str) -> Any:
    """A file system of one's own that talks to the server at ``url``, whatever stands before it for the others.

    It waits long: the server puts a large upload together in memory, and asked again while at it, fails.
    """
    patience = {"read_timeout": 300}
    return fsspec.filesystem(
        "s3", endpoint_url=url, key="test", secret="test", config_kwargs=patience, skip_instance_cache=True
    )


@contextmanager
def s3_process(latency_seconds: float = 0.0, bytes_per_second: float | None = None) -> Iterator[tuple[str, str]]:
    """(URL of a server, URL of the proxy before it) in a process of their own: measured is the reader alone."""
    command = [sys.executable, "-m", "tests.support.s3", "--latency", str(latency_seconds)]
    if bytes_per_second is not None:
        command += ["--rate", str(bytes_per_second)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            server, proxy = process.stdout.readline().split()  # type: ignore[union-attr]
            yield server, proxy
        finally:
            process.stdin.close()  # type: ignore[union-attr]


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, help="bytes per second of all connections together")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as url, faulty_proxy(url) as proxy:
        proxy.latency_seconds, proxy.bytes_per_second, proxy.remember = options.latency, options.rate, True
        print(url, proxy.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
