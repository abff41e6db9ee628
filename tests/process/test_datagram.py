"""Datagrams: whole, from the right address, and never into a loop."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.conftest import InNamespace
from tests.process.launcher import Launcher, eventually, frozen
from tests.process.peers import Address, Sockets, assert_silent, pattern, round_trip

SIZES = (0, 1, 1024, 1025, 65_507)

# Where a server is bound, and addresses at which a client may call it.
BINDINGS = {
    "inet": (socket.AF_INET, "127.0.0.1", ("127.0.0.1",)),
    "inet-wildcard": (socket.AF_INET, "0.0.0.0", ("127.0.0.1", "127.0.0.5", "127.9.9.9")),
    "inet6": (socket.AF_INET6, "::1", ("::1",)),
    "dual-stack": (socket.AF_INET6, "::", ("::1", "127.0.0.5", "127.0.0.1")),
}

# Ports of services that answer anything, as README lists them.
REFUSED = (
    *(7, 11, 13, 17, 19, 37, 53, 69, 111, 123, 137, 161, 389, 500, 520, 1434),
    *(1900, 3702, 5060, 5353, 5683, 11211),
)

DROPPED = "dropped_datagrams_total"


@pytest.mark.parametrize("binding", BINDINGS)
def test_datagram_any_size_comes_back_whole_from_where_it_was_sent(
    launch: Launcher, sockets: Sockets, binding: str
) -> None:
    family, address, called = BINDINGS[binding]
    server = sockets.bind(family, address)
    launch.start([server])
    port = server.getsockname()[1]
    for host in called:
        client = sockets.keep(
            socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        )
        for size in SIZES:
            payload = pattern(size)
            client.sendto(payload, (host, port))
            answer, source = client.recvfrom(1 << 17)
            assert (answer, source[:2]) == (payload, (host, port))


def test_datagram_mapped_client_on_dual_stack_is_answered(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.bind(socket.AF_INET6, "::")
    launch.start([server])
    client = sockets.bind(socket.AF_INET6, "::")
    target = ("::ffff:127.0.0.5", server.getsockname()[1])
    client.sendto(b"mapped", target)
    answer, source = client.recvfrom(100)
    assert (answer, source[:2]) == (b"mapped", target)


def test_datagram_counts_are_right(launch: Launcher, sockets: Sockets) -> None:
    server, metrics = sockets.bind(), sockets.listen()
    launch.start([server, metrics], names=["udp", "metrics"])
    client = sockets.connect(server)
    for size in SIZES:
        client.send(pattern(size))
        client.recv(1 << 17)
    page = pages.scrape(metrics)
    assert page[("received_datagrams_total", "udp")] == len(SIZES)
    assert page[("sent_datagrams_total", "udp")] == len(SIZES)
    assert page[("received_octets_total", "udp")] == sum(SIZES)
    assert page[("sent_octets_total", "udp")] == sum(SIZES)


def test_datagram_burst_is_answered_in_order(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.bind()
    appliance = launch.start([server])
    client = sockets.connect(server)
    sent = [b"%d" % number for number in range(150)]
    with frozen(appliance.pid):
        for datagram in sent:
            client.send(datagram)
    assert [client.recv(100) for _ in sent] == sent


def test_datagram_client_that_is_gone_disturbs_nobody(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.bind()
    appliance = launch.start([server])
    with frozen(appliance.pid):
        for _ in range(5):
            client = sockets.connect(server)
            client.send(b"bye")
            client.close()  # the answer will meet a closed port: an ICMP error comes back
    for _ in range(5):
        round_trip(sockets.connect(server))
    appliance.assert_sleeps(0.1)


def test_datagram_connected_socket_echoes_to_its_peer(launch: Launcher, sockets: Sockets) -> None:
    server, client = sockets.bind(), sockets.bind()
    server.connect(client.getsockname())
    client.connect(server.getsockname())
    launch.start([server])
    for size in SIZES:
        round_trip_datagram(client, pattern(size))


def round_trip_datagram(sock: socket.socket, payload: bytes) -> None:
    """Send one, receive one, and compare; an empty one too."""
    sock.send(payload)
    assert sock.recv(1 << 20) == payload


# -- in a network of our own -------------------------------------------------


class Network:
    """A wildcard server, a metrics page and a client, all in one private namespace."""

    def __init__(self, sockets: Sockets, in_namespace: InNamespace, address: str) -> None:
        """Let the client have this address."""
        self._sockets = sockets
        self._in_namespace = in_namespace
        self._address = address
        in_namespace(self._make)
        self.port = self.server.getsockname()[1]

    def _make(self) -> None:
        wide, self.scope = (
            ("::" if ":" in self._address else "0.0.0.0"),
            socket.if_nametoindex("v0"),
        )
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        self.server = self._sockets.bind(family, wide)
        self.metrics = self._sockets.listen(socket.AF_UNIX)
        self.client = self._sockets.bind(family, self.at(self._address, 0))
        # Ports below 1024 are root's, and here nobody else has taken them.
        self.services = [self._sockets.bind(family, (wide, port)) for port in REFUSED]
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        self.raw = self._sockets.keep(raw)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if family == socket.AF_INET:
            join = socket.inet_aton("239.1.2.3") + socket.inet_aton("192.0.2.1")
            self.server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, join)
        else:
            join = socket.inet_pton(socket.AF_INET6, "ff05::77") + struct.pack("@I", self.scope)
            self.server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, join)
            self.client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, self.scope)

    def at(self, host: str, port: int) -> Address:
        """Return a socket address; a link-local one only means something with its link."""
        return (host, port, 0, self.scope) if host.startswith("fe80") else (host, port)


Make = Callable[[str], Network]


@pytest.fixture
def network(sockets: Sockets, in_namespace: InNamespace) -> Make:
    return lambda address: Network(sockets, in_namespace, address)


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("192.0.2.9", ("192.0.2.1", "192.0.2.2", "192.0.2.3", "127.0.0.8")),
        ("2001:db8::9", ("2001:db8::1", "2001:db8::2")),
        ("fe80::9", ("fe80::5",)),
        ("::ffff:192.0.2.9", ("::ffff:192.0.2.1", "::ffff:192.0.2.2")),
    ],
    ids=["inet", "inet6", "link-local", "mapped"],
)
def test_datagram_host_with_many_addresses_answers_from_each(
    launch: Launcher, network: Make, address: str, hosts: tuple[str, ...]
) -> None:
    here = network(address)
    launch.start([here.server])
    for host in hosts:
        # Both have several addresses: without a choice the kernel would take another.
        here.client.sendto(b"from there?", here.at(host, here.port))
        answer, source = here.client.recvfrom(100)
        assert answer == b"from there?"
        assert (source[0].partition("%")[0], source[1]) == (host, here.port)


def test_datagram_from_services_that_answer_anything_is_dropped_and_counted(
    launch: Launcher, network: Make
) -> None:
    here = network("192.0.2.9")
    launch.start([here.server, here.metrics], names=["udp", "metrics"])
    target = ("192.0.2.1", here.port)
    for service in here.services:
        service.sendto(b"loop", target)
    here.client.sendto(b"no loop", target)  # queued behind them all
    assert here.client.recv(100) == b"no loop"
    for service in here.services:
        assert_silent(service)
    page = pages.scrape(here.metrics)
    assert page[(DROPPED, "udp", "refused-port")] == len(REFUSED)
    assert page[("received_datagrams_total", "udp")] == len(REFUSED) + 1
    assert page[("sent_datagrams_total", "udp")] == 1


def test_datagram_from_any_port_is_answered_when_the_user_says_so(
    launch: Launcher, network: Make
) -> None:
    here = network("192.0.2.9")
    launch.start([here.server], "--allow-any-source")
    for service in here.services:
        service.sendto(b"really", ("192.0.2.1", here.port))
        assert service.recv(100) == b"really"


@pytest.mark.parametrize(
    ("address", "group", "host"),
    [
        ("192.0.2.9", "239.1.2.3", "192.0.2.1"),
        ("192.0.2.9", "255.255.255.255", "192.0.2.1"),
        ("192.0.2.9", "192.0.2.255", "192.0.2.1"),
        ("2001:db8::9", "ff05::77", "2001:db8::1"),
    ],
)
def test_datagram_to_a_group_is_dropped_and_counted(
    launch: Launcher, network: Make, address: str, group: str, host: str
) -> None:
    here = network(address)
    launch.start([here.server, here.metrics], names=["udp", "metrics"])
    here.client.sendto(b"anybody?", (group, here.port))
    here.client.sendto(b"you", (host, here.port))
    assert here.client.recv(100) == b"you"
    assert_silent(here.client)
    page = pages.scrape(here.metrics)
    dropped = {key[2]: value for key, value in page.items() if key[0] == DROPPED}
    assert sum(dropped.values()) >= 1
    assert page[("sent_datagrams_total", "udp")] == 1
    # A directed broadcast looks like any address; there the kernel refuses to send from it.
    if group != "192.0.2.255":
        assert set(dropped) == {"sent-to-group"}


# -- loops -------------------------------------------------------------------


def test_datagram_forged_from_port_0_or_from_ourselves_is_dropped_and_counted(
    launch: Launcher, network: Make
) -> None:
    here = network("192.0.2.9")
    launch.start([here.server, here.metrics], names=["udp", "metrics"])
    for source in (0, here.port):
        # source, destination, length, checksum (0: none), data
        octets = struct.pack("!HHHH", source, here.port, 8 + 4, 0) + b"evil"
        here.raw.sendto(octets, ("192.0.2.1", 0))
    page = pages.until(here.metrics, {(DROPPED, "udp", "refused-port"): 2})
    assert page[("sent_datagrams_total", "udp")] == 0


def test_datagram_forged_between_two_appliances_starts_no_loop(
    launch: Launcher, sockets: Sockets
) -> None:
    first, metrics = sockets.bind(), sockets.listen()
    second = sockets.bind(address=("127.0.0.2", first.getsockname()[1]))
    launch.start([first, metrics], names=["udp", "metrics"])
    launch.start([second])
    second.sendto(b"from one to the other", first.getsockname())
    page = pages.until(metrics, {(DROPPED, "udp", "refused-port"): 1})
    assert page[("received_datagrams_total", "udp")] == 1
    assert page[("sent_datagrams_total", "udp")] == 0


def test_datagram_forged_between_two_sockets_of_one_appliance_starts_no_loop(
    launch: Launcher, sockets: Sockets
) -> None:
    first, second, metrics = sockets.bind(), sockets.bind(), sockets.listen()
    launch.start([first, second, metrics], names=["a", "b", "metrics"])
    second.sendto(b"to myself", first.getsockname())
    page = pages.until(metrics, {(DROPPED, "a", "refused-port"): 1})
    assert (page[("sent_datagrams_total", "a")], page[("received_datagrams_total", "b")]) == (0, 0)


# -- unix --------------------------------------------------------------------


def test_datagram_unix_clients_are_answered_wherever_they_can_be_reached(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.bind(socket.AF_UNIX)
    launch.start([server])
    for address in ("", sockets.path(), "\0echo-test-" + pattern(8).hex()):
        client = sockets.client(server, address)
        for size in (*SIZES, 150_000):
            payload = pattern(size)
            client.sendto(payload, server.getsockname())
            assert client.recvfrom(1 << 20) == (payload, server.getsockname())


def test_datagram_unix_longest_of_an_unprivileged_client_comes_back_whole(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.bind(socket.AF_UNIX)
    launch.start([server])
    client = sockets.connect(server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212_992)
    round_trip_datagram(client, pattern(400_000))


def test_datagram_unix_client_without_address_is_dropped_and_counted(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.bind(socket.AF_UNIX), sockets.listen()
    launch.start([server, metrics], names=["unix", "metrics"])
    nobody = sockets.client(server)
    nobody.sendto(b"answer whom?", server.getsockname())
    round_trip(sockets.connect(server))
    page = pages.scrape(metrics)
    assert page[(DROPPED, "unix", "client-without-address")] == 1


def test_datagram_unix_client_that_is_gone_is_dropped_and_counted(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.bind(socket.AF_UNIX), sockets.listen()
    appliance = launch.start([server, metrics], names=["unix", "metrics"])
    with frozen(appliance.pid):
        closed, unlinked = (sockets.client(server, sockets.path()) for _ in range(2))
        for client in (closed, unlinked):
            client.sendto(b"bye", server.getsockname())
        closed.close()  # its file stays
        Path(unlinked.getsockname()).unlink()
    round_trip(sockets.connect(server))
    page = pages.scrape(metrics)
    assert page[(DROPPED, "unix", "client-gone")] == 1
    assert page[(DROPPED, "unix", "client-address-not-reachable")] == 1


def test_datagram_unix_client_that_does_not_read_holds_up_nobody(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.bind(socket.AF_UNIX), sockets.listen()
    appliance = launch.start([server, metrics], names=["unix", "metrics"])
    hog = sockets.client(server, "")
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 1  # the limit is exceeded
    for number in range(queue + 20):
        hog.sendto(b"%d" % number, server.getsockname())
    pages.until(metrics, {(DROPPED, "unix", "send-buffer-full"): 20})
    appliance.assert_sleeps(0.2)
    round_trip(sockets.connect(server))
    assert [hog.recv(100) for _ in range(queue)] == [b"%d" % number for number in range(queue)]


def test_datagram_unix_send_buffer_that_is_full_drops_and_does_not_block(
    launch: Launcher, sockets: Sockets
) -> None:
    server, stream, metrics = sockets.bind(socket.AF_UNIX), sockets.listen(), sockets.listen()
    appliance = launch.start([server, stream, metrics], names=["unix", "tcp", "metrics"])
    # The queue of a connected client knows no limit but the sender's buffer, which is ours.
    hog = sockets.connect(server)
    octets = pattern(50_000)
    for _ in range(200):
        hog.send(octets)
    eventually(lambda: pages.scrape(metrics).get((DROPPED, "unix", "send-buffer-full")), "drops")
    appliance.assert_sleeps(0.2)
    round_trip(sockets.connect(stream))
    hog.close()
    round_trip(sockets.connect(server))


def test_datagram_server_queue_that_is_full_is_drained(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.bind(socket.AF_UNIX)
    appliance = launch.start([server])
    clients = [sockets.connect(server) for _ in range(30)]
    with frozen(appliance.pid):
        waiting = []
        for client in clients:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.send(b"queued")
                waiting.append(client)
    assert 0 < len(waiting) < len(clients), "the queue must be full for this test to mean something"
    for client in waiting:
        eventually(lambda: _received(client), "its answer")  # noqa: B023


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(100)
    except BlockingIOError:
        return b""
