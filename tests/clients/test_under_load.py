"""The questions of benchmarks/server, asked small: they have their numbers, and the right ones."""

import argparse
import asyncio
from typing import Any

from benchmarks.server import disconnects, first_byte, growth, open_streams
from benchmarks.server.process import Served


def asked(**how: Any) -> argparse.Namespace:
    return argparse.Namespace(**how)


def test_more_streams_than_are_decoded_together_are_all_whole(server: Served) -> None:
    found = asyncio.run(open_streams.measured(server, asked(streams=24, minutes=0.01, tokens=12)))
    assert found["n_faults"] == 0, found["faults"]
    assert found["whole"] >= 24
    assert found["running_after"] == 0


def test_the_model_stops_for_clients_that_go_away(server: Served) -> None:
    found = asyncio.run(disconnects.measured(server, asked(disconnects=32, together=16)))
    assert found["client_gone"] > 0
    assert found["slowest_s"] < 5  # 1 s, and a machine that has much else to do
    assert found["files_after"] <= found["files_before"] + 2  # of what keeps a connection alive


def test_a_server_is_asked_in_every_way_and_its_memory_is_seen(server: Served) -> None:
    samples = asyncio.run(growth.measured(server, asked(requests=24, together=4, every=8)))
    assert [number for number, _ in samples] == [0, 8, 16]
    assert all(n_bytes > 1e6 for _, n_bytes in samples)


def test_headers_come_before_words(server: Served) -> None:
    headers, word = asyncio.run(first_byte.times(server, 1))
    assert 0 < headers < word
