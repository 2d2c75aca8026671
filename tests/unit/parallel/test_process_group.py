"""Where ranks meet."""

from __future__ import annotations

import random
import socket

from posttrain_lib.parallel.process_group import free_port


def test_a_free_port_can_be_listened_at_and_is_given_to_no_outgoing_connection() -> None:
    random.seed(0)
    before = random.getstate()
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert 20_000 <= port < 32_768
        others = {free_port() for _ in range(20)}
    assert port not in others and len(others) > 1
    assert random.getstate() == before, "a run's seeded draws are its own"
