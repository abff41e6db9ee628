"""Byte streams and SEQPACKET messages: exact, bounded, and each connection for itself."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from tests.process import pages
from tests.process.conftest import lacking
from tests.process.launcher import DEADLINE, Launcher, eventually
from tests.process.peers import (
    Sockets,
    exchange,
    pattern,
    receive,
    receive_to_end,
    reset,
    round_trip,
    stuff,
)

FAMILIES = {
    "inet": (socket.AF_INET, None),
    "inet6": (socket.AF_INET6, None),
    "unix": (socket.AF_UNIX, None),
    "abstract": (socket.AF_UNIX, ""),  # autobound
}

# What README promises that a stalled connection may cost, and some room for the allocator.
PER_CONNECTION = 512 * 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_octets_come_back(launch: Launcher, sockets: Sockets, family: str) -> None:
    server = sockets.listen(*FAMILIES[family])
    appliance = launch.start([server])
    for _ in range(3):
        client = sockets.connect(server)
        round_trip(client, pattern(1000))
        client.shutdown(socket.SHUT_WR)
        assert receive_to_end(client) == b""
    assert appliance.stop() == 0


def test_stream_dual_stack_serves_both_families(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen(socket.AF_INET6, "::")
    launch.start([server])
    for host in ("::1", "127.0.0.1", "127.0.0.9"):
        round_trip(sockets.connect(server, host=host))


def test_stream_mix_of_all_kinds_is_served_by_one_process(
    launch: Launcher, sockets: Sockets
) -> None:
    streams = [sockets.listen(*FAMILIES[family]) for family in FAMILIES]
    packets = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    datagrams = [sockets.bind(f) for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)]
    ours, theirs = sockets.pair()
    appliance = launch.start([*streams, *datagrams, packets, theirs])
    theirs.close()
    for server in (*streams, *datagrams, packets):
        round_trip(sockets.connect(server), b"to each its own")
    round_trip(ours)
    status = appliance.notified.first("STATUS=") or ""
    for words in ("inet stream 127.0.0.1:", "inet6 dgram [::1]:", "unix seqpacket /", "stream @"):
        assert words in status


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_stream_vsock_is_served(
    launch: Launcher, sockets: Sockets, kind: socket.SocketKind
) -> None:
    any_port = (socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY)
    try:
        server = sockets.listen(socket.AF_VSOCK, any_port, kind)
    except OSError as error:
        lacking(f"no vsock on this kernel ({error}): load the module vsock")
    appliance = launch.start([server])
    words = {socket.SOCK_STREAM: "stream", socket.SOCK_SEQPACKET: "seqpacket"}[kind]
    status = appliance.notified.first("STATUS=") or ""
    assert f"vsock {words} {socket.VMADDR_CID_ANY}:{server.getsockname()[1]}" in status
    # Beyond this it takes a kernel with vsock_loopback; the vm tier has a real guest.
    client = sockets.keep(socket.socket(socket.AF_VSOCK, kind))
    client.settimeout(0.3)
    try:
        client.connect((1, server.getsockname()[1]))  # VMADDR_CID_LOCAL
    except OSError:
        assert appliance.stop() == 0
        return
    client.settimeout(5)
    round_trip(client, pattern(10_000))


# -- any size, any pace ------------------------------------------------------


@pytest.mark.parametrize("family", ["inet", "unix"])
@pytest.mark.parametrize("eager", [True, False], ids=["quick", "slow"])
def test_stream_64_mib_come_back_whole(
    launch: Launcher, sockets: Sockets, payload: bytes, family: str, eager: bool
) -> None:
    server = sockets.listen(*FAMILIES[family])
    appliance = launch.start([server])
    before = appliance.rss
    client = sockets.connect(server, receive_buffer=0 if eager else 32 << 10)
    read_size = (1 << 18) if eager else (1 << 14)
    assert exchange(client, payload, eager=eager, read_size=read_size) == payload
    assert appliance.rss - before < 4 << 20


def test_stream_half_close_delivers_all_that_is_unsent(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server = sockets.listen()
    launch.start([server])
    client = sockets.connect(server)
    sent = stuff(client, memoryview(payload))
    assert 1 << 20 < sent < len(payload), "every buffer on the way must be full"
    client.shutdown(socket.SHUT_WR)
    assert receive_to_end(client) == payload[:sent]


def test_stream_client_that_connects_and_closes_leaves_no_trace(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    launch.start([server, metrics], names=["echo", "metrics"])
    for _ in range(20):
        sockets.connect(server).close()
    pages.until(metrics, {("connections_total", "echo"): 20, ("connections", "echo"): 0})
    assert not [key for key in pages.scrape(metrics) if key[0] == "connections_ended_total"]


def test_stream_reset_ends_that_connection_only(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    launch.start([server, metrics], names=["echo", "metrics"])
    other = sockets.connect(server)
    round_trip(other)
    idle, stalled = sockets.connect(server), sockets.connect(server)
    round_trip(idle)
    stuff(stalled, memoryview(payload))
    for client in (idle, stalled):
        reset(client)
    page = pages.until(metrics, {("connections", "echo"): 1})
    assert page[("connections_ended_total", "echo", "reset")] == 2
    round_trip(other)


# -- many, and slow ones -----------------------------------------------------


def test_stream_1000_clients_at_once_all_get_their_own(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server])
    clients = [sockets.connect(server) for _ in range(1000)]
    for turn in range(3):
        for number, client in enumerate(clients):
            client.sendall(b"%d of turn %d;" % (number, turn))
        for number, client in enumerate(clients):
            expected = b"%d of turn %d;" % (number, turn)
            assert receive(client, len(expected)) == expected
    for client in clients:
        client.close()
    assert appliance.stop() == 0


def test_stream_clients_that_never_read_cost_bounded_memory_and_no_processor(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server = sockets.listen()
    appliance = launch.start([server])
    round_trip(sockets.connect(server), payload[: 1 << 20])
    before = appliance.rss
    hogs = [sockets.connect(server, receive_buffer=8 << 10) for _ in range(24)]
    sent = [stuff(hog, memoryview(payload), quiet=0.02) for hog in hogs]
    assert max(sent) < len(payload), "the appliance takes without end"
    appliance.assert_sleeps()
    assert appliance.rss - before < len(hogs) * PER_CONNECTION
    for _ in range(100):
        round_trip(sockets.connect(server))
    # What was taken is still owed, and comes as soon as it is read.
    hogs[0].shutdown(socket.SHUT_WR)
    assert receive_to_end(hogs[0]) == payload[: sent[0]]


# -- seqpacket ---------------------------------------------------------------


def test_seqpacket_messages_keep_their_bounds(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    launch.start([server])
    client = sockets.connect(server)
    messages = [pattern(size) for size in (1, 0, 2, 1024, 0, 0, 65_536, 150_000, 3)]
    for message in messages:
        client.send(message)
    assert [client.recv(1 << 20) for _ in messages] == messages


def test_seqpacket_empty_message_before_the_close_is_echoed(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    launch.start([server])
    client = sockets.connect(server)
    for message in (b"", b"after", b""):
        client.send(message)
    client.shutdown(socket.SHUT_WR)
    # An empty message and the end are told apart by the sender's credentials.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    got = [client.recvmsg(100, 100)[:2] for _ in range(4)]
    assert [data for data, _ in got] == [b"", b"after", b"", b""]
    assert [bool(ancillary) for _, ancillary in got] == [True, True, True, False]


def _stuff_messages(hog: socket.socket) -> list[bytes]:
    """Send, and read nothing, until no more is taken; return what was."""
    hog.settimeout(0.1)
    sent: list[bytes] = []
    with contextlib.suppress(TimeoutError):
        while len(sent) < 10_000:
            message = pattern(1000 + len(sent))
            hog.send(message)
            sent.append(message)
    hog.settimeout(DEADLINE)
    return sent


def test_seqpacket_client_that_never_reads_holds_up_nobody(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    appliance = launch.start([server])
    hog = sockets.connect(server)
    sent = _stuff_messages(hog)
    assert len(sent) < 10_000, "the appliance takes without end"
    appliance.assert_sleeps()
    round_trip(sockets.connect(server))
    hog.shutdown(socket.SHUT_WR)
    assert [hog.recv(1 << 20) for _ in sent] == sent
    assert hog.recv(1) == b""


def test_seqpacket_longest_message_of_an_unprivileged_client_comes_back_whole(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    launch.start([server])
    client = sockets.connect(server)
    # Anybody may ask for this much; the kernel doubles it, and the message counts against that.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212_992)
    message = pattern(400_000)
    client.send(message)
    assert client.recv(1 << 20) == message


# -- connections that come already connected ---------------------------------


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connected_tcp_is_served_and_then_the_process_ends(
    launch: Launcher, sockets: Sockets, family: int
) -> None:
    server = sockets.listen(family)
    client = sockets.connect(server)
    theirs, _ = server.accept()
    appliance = launch.start([theirs])
    theirs.close()
    round_trip(client)
    assert not appliance.exited
    client.shutdown(socket.SHUT_WR)
    assert receive_to_end(client) == b""
    assert appliance.wait() == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_connected_unix_pair_is_served_and_then_the_process_ends(
    launch: Launcher, sockets: Sockets, kind: socket.SocketKind
) -> None:
    ours, theirs = sockets.pair(kind)
    appliance = launch.start([theirs])
    theirs.close()
    round_trip(ours, pattern(5000))
    ours.close()
    assert appliance.wait() == 0


def test_connected_pairs_are_all_served_before_the_process_ends(
    launch: Launcher, sockets: Sockets
) -> None:
    pairs = [sockets.pair() for _ in range(3)]
    appliance = launch.start([theirs for _, theirs in pairs])
    for ours, theirs in pairs:
        theirs.close()
        round_trip(ours)
    for ours, _ in pairs:
        assert not appliance.exited
        round_trip(ours)
        ours.close()
    assert appliance.wait() == 0


def test_connected_seqpacket_sent_before_the_start_is_echoed(
    launch: Launcher, sockets: Sockets
) -> None:
    ours, theirs = sockets.pair(socket.SOCK_SEQPACKET)
    for message in (b"", b"early"):
        ours.send(message)
    appliance = launch.start([theirs])
    theirs.close()
    assert [ours.recv(100), ours.recv(100)] == [b"", b"early"]
    ours.close()
    assert appliance.wait() == 0


def test_connected_tcp_that_was_reset_before_the_start_ends_the_process_well(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    client = sockets.connect(server)
    theirs, _ = server.accept()
    reset(client)
    # The reset has come in when the connection has an end to report.
    eventually(lambda: theirs.getsockopt(socket.SOL_TCP, socket.TCP_INFO, 1) == b"\7", "the reset")
    appliance = launch.start([theirs], ready=False)
    theirs.close()
    assert appliance.wait() == 0, appliance.stderr


def test_connected_datagram_pair_is_echoed_until_it_is_told_to_end(
    launch: Launcher, sockets: Sockets
) -> None:
    ours, theirs = sockets.pair(socket.SOCK_DGRAM)
    appliance = launch.start([theirs])
    theirs.close()
    for message in (b"one", b"", pattern(65_507)):
        ours.send(message)
        assert ours.recv(1 << 20) == message
    # A datagram pair has no end to see: it lasts until SIGTERM, or --exit-idle.
    assert appliance.stop() == 0


def test_stream_threads_of_bulk_and_small_messages_do_not_mix(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server = sockets.listen()
    launch.start([server])
    answers: dict[int, bytes] = {}
    parts = {n: payload[n << 22 : (n + 1) << 22] for n in range(4)}
    bulk = [
        threading.Thread(
            target=lambda n=n: answers.update(
                {n: exchange(sockets.connect(server), parts[n], eager=bool(n % 2))}
            )
        )
        for n in parts
    ]
    for thread in bulk:
        thread.start()
    small = sockets.connect(server)
    for number in range(200):
        round_trip(small, b"%d" % number)
    for thread in bulk:
        thread.join()
    assert answers == parts
