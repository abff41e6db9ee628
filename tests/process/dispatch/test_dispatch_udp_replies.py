"""Echo behind a wildcard UDP port answers from the port that the client knows."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process.dispatch.space import DEADLINE, Space


@contextmanager
def echo(space: Space, sock: socket.socket) -> Iterator[int]:
    """An echo server with this socket; yields its process id."""
    process = space.start([], (("echo", sock),), {}, mode="echo")
    try:
        yield process.pid
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


def ask(client: socket.socket, octets: bytes) -> bytes:
    client.send(octets)  # connected: only an answer from that address and port arrives
    return client.recv(2000)


def connected(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client = socket.socket(family, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.connect((address, port))
    return client


@pytest.mark.parametrize("server", ["127.0.0.1", "::"])
def test_echo_answers_from_any_port_of_a_prefix(space: Space, server: str) -> None:
    sock = space.udp(server)
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(("echo", sock)).status == 0
    with echo(space, sock):
        for address, port in (("127.1.0.1", 7777), ("127.1.0.1", 8888), ("127.1.9.9", 1)):
            with connected(address, port) as one, connected(address, port) as other:
                for number in range(5):  # the later ones by the flow's own socket
                    assert ask(one, b"one %d" % number) == b"one %d" % number
                    assert ask(other, b"other %d" % number) == b"other %d" % number


def test_echo_answers_from_any_port_over_ipv6(space: Space) -> None:
    sock = space.udp("::1")
    space.run_tool("ip", "-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    space.ok("bind", "echo", "udp", "2001:db8::/64", "1000-2000")
    assert space.register(("echo", sock)).status == 0
    with echo(space, sock), connected("2001:db8::77", 1234) as client:
        assert [ask(client, b"%d" % number) for number in range(3)] == [b"0", b"1", b"2"]


def test_flows_are_bounded_and_none_steals_from_another(space: Space) -> None:
    sock = space.udp()
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(("echo", sock)).status == 0
    with echo(space, sock) as pid:
        clients = [connected("127.1.0.1", 5000) for _ in range(1100)]
        for turn in range(2):
            for number, client in enumerate(clients):
                octets = b"%d %d" % (turn, number)
                assert ask(client, octets) == octets
        assert len(space.descriptors(pid)) < 1024 + 20
        for client in clients:
            client.close()


def test_an_answer_of_ours_is_not_answered_for_ever(space: Space) -> None:
    sock = space.udp()
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(("echo", sock)).status == 0
    # As if forged: its source is one of the ports that are steered to us, and nobody is there.
    with space.udp("127.1.0.1", 5000) as forger:
        forger.sendto(b"for ever", ("127.1.0.1", 6000))
    with echo(space, sock) as pid, connected("127.1.0.2", 7000) as client:
        assert ask(client, b"served") == b"served"  # after the forged one, so that was answered
        before = cpu_ticks(pid)
        time.sleep(0.4)
        assert cpu_ticks(pid) - before < 10, "it is idle, not answering itself"


def cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
