"""Echo behind a wildcard UDP port answers from the port that the client knows."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process.dispatch.clients import ask, connected, is_empty
from tests.process.dispatch.sidecars import eventually
from tests.process.dispatch.space import DEADLINE, STUB, TAKING, Space

# The command with a shorter life of idle flows, so that a test can wait for their end.
_SHORT_LIVED = f"""{TAKING}
from echo_appliance.echo import replies
replies.IDLE_SECONDS = 1.0
from echo_appliance.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def echo(
    space: Space, *sockets: socket.socket, options: str = "", stub: str = STUB
) -> Iterator[int]:
    """An echo server with these sockets; yields its process id."""
    passed = [("echo", sock) for sock in sockets]
    process = space.start(options.split(), passed, {}, mode="echo", stub=stub)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


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


def test_flows_end_when_they_are_idle_and_begin_again_when_asked(space: Space) -> None:
    sock = space.udp()
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(("echo", sock)).status == 0
    with echo(space, sock, stub=_SHORT_LIVED) as pid, connected("127.1.0.1", 5000) as client:
        with connected(*sock.getsockname()) as other:
            assert ask(other, b"it is there") == b"it is there"
        before = len(space.descriptors(pid))
        for octets in (b"first", b"again"):
            assert ask(client, octets) == octets
            assert len(space.descriptors(pid)) == before + 1
            eventually(lambda: len(space.descriptors(pid)) == before)


def test_flow_that_ends_for_another_mixes_up_no_datagrams(space: Space) -> None:
    sock = space.udp()
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(("echo", sock)).status == 0
    clients = [space.keep(connected("127.1.0.1", 5000)) for _ in range(1025)]
    *begun, last = clients
    with echo(space, sock) as pid:
        for client in begun:
            assert ask(client, b"begun") == b"begun"
        os.kill(pid, signal.SIGSTOP)
        last.send(b"new flow")  # for which the first one has to end,
        begun[0].send(b"old flow, with a longer datagram")  # which has this in its queue
        os.kill(pid, signal.SIGCONT)
        assert last.recv(100) == b"new flow"
        assert begun[0].recv(100) == b"old flow, with a longer datagram"


@pytest.mark.parametrize("options", ["", "--workers 3"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_of_ours_is_not_answered_for_ever(space: Space, options: str, count: int) -> None:
    sockets = [space.udp() for _ in range(count)]  # of several each gets some of the flows
    space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
    assert space.register(*(("echo", sock) for sock in sockets)).status == 0
    # As if forged: its source is one of the ports that are steered to us, and nobody is there.
    for port in range(5000, 5040):
        with space.udp("127.1.0.1", port) as forger:
            forger.sendto(b"for ever", ("127.1.0.1", 6000))
    with echo(space, *sockets, options=options) as pid, connected("127.1.0.2", 7000) as client:
        assert ask(client, b"served") == b"served"
        eventually(lambda: all(map(is_empty, sockets)))
        before = cpu_ticks(pid)
        time.sleep(0.4)
        assert cpu_ticks(pid) - before < 10, "it is idle, not answering itself"


def cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process and its workers, in hundredths of a second."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    stats = [Path(f"/proc/{one}/stat").read_text() for one in (str(pid), *children)]
    fields = [text.rpartition(")")[2].split() for text in stats]
    return sum(int(row[11]) + int(row[12]) for row in fields)
