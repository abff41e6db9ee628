"""Much of what is sent gets lost, late or spoiled; what arrives is right all the same."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.launcher import eventually
from tests.process.netstack.net import (
    OURS,
    OURS6,
    PORT,
    Net,
    connect,
    echo,
    metrics,
)
from tests.process.peers import pattern

ROOT = Path(__file__).parents[3]
SIZE = 1 << 20
AT_ONCE = 1_000


@contextlib.contextmanager
def relay(tap: int, other: socket.socket, seed: int) -> Iterator[None]:
    """Put the bad network between the kernel's tap and our stack."""
    words = [sys.executable, "-m", "tests.process.netstack.relay"]
    process = subprocess.Popen(
        [*words, str(tap), str(other.fileno()), str(seed)], cwd=ROOT, pass_fds=(tap, other.fileno())
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("address", [OURS, OURS6])
def test_echo_by_way_of_a_bad_link_is_byte_exact(net: Net, address: str, seed: int) -> None:
    ours, theirs = net.frames()
    page = net.page()
    with relay(net.tap(vnet=False), theirs, seed):
        net.serve(ours, "--claim", "0", passed=[("metrics", page)])
        data = pattern(SIZE)
        with connect(PORT, address) as sock:
            assert echo(data, sock) == data
    assert metrics(page.getsockname())["received_octets_total"] == SIZE


def test_thousand_connections_at_once_are_served_and_leave_nothing(net: Net) -> None:
    page = net.page()
    server = net.serve(net.tap(), passed=[("metrics", page)])

    def crowd() -> int:
        """Serve them all; return what is resident once they are gone."""
        with contextlib.ExitStack() as kept:
            socks = [kept.enter_context(connect()) for _ in range(AT_ONCE)]
            for number, sock in enumerate(socks):
                sock.sendall(b"%d" % number)
            for number, sock in enumerate(socks):
                expected = b"%d" % number
                assert sock.recv(100) == expected
        eventually(lambda: metrics(page.getsockname())["connections"] == 0, "their end")
        return server.rss

    crowd()
    before = crowd()  # an interpreter keeps what it once had, to use it again
    for _ in range(5):
        after = crowd()
    assert after - before < 4 << 20, "each connection leaves something"


def test_ten_thousand_connections_one_after_another_leave_nothing(net: Net) -> None:
    server = net.serve(net.tap())

    def row(length: int) -> int:
        """Serve so many; return what is resident then."""
        for _ in range(length):
            with connect() as sock:
                sock.sendall(b"x" * 100)
                assert sock.recv(100)
        return server.rss

    before = row(1_000)
    assert row(10_000) - before < 1 << 20, "each connection leaves something"
