"""Datagrams through the forwarder: sessions, where answers leave from, what is refused."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.conftest import InNamespace
from tests.process.forwarding import FAMILIES, Forwarding, target
from tests.process.launcher import Launcher, eventually
from tests.process.peers import Sockets, assert_silent, pattern

SO_TIMESTAMPNS = 35  # asm-generic/socket.h


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


def exchange(client: socket.socket, backend: socket.socket, octets: bytes) -> object:
    """Send to the backend and back; return whom the backend saw."""
    client.send(octets)
    received, peer = backend.recvfrom(1 << 20)
    assert received == octets
    backend.sendto(octets[::-1], peer)
    assert client.recv(1 << 20) == octets[::-1]
    return peer


@pytest.mark.parametrize("here", FAMILIES)
@pytest.mark.parametrize("there", FAMILIES)
def test_forward_datagrams_join_any_two_families(
    forward: Forwarding, sockets: Sockets, here: str, there: str
) -> None:
    front, backend = sockets.bind(*FAMILIES[here]), sockets.bind(*FAMILIES[there])
    forwarder = forward.to(front, backend)
    client = sockets.connect(front)
    seen = {exchange(client, backend, pattern(size)) for size in (1, 1000, 60_000)}
    assert len(seen) == 1, "one client, one session"
    assert exchange(sockets.connect(front), backend, b"other") not in seen
    backend.close()
    assert forwarder.stop() == 0


def test_forward_empty_datagrams_are_datagrams(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.bind(), sockets.bind()
    forward.to(front, backend)
    exchange(sockets.connect(front), backend, b"")


@pytest.mark.parametrize("host", ["192.0.2.3", "2001:db8::2"])
def test_forward_answers_leave_from_the_address_that_was_asked(
    forward: Forwarding, sockets: Sockets, in_namespace: InNamespace, host: str
) -> None:
    def make() -> tuple[socket.socket, socket.socket]:
        front = sockets.bind(socket.AF_INET6, "::")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        client = sockets.keep(socket.socket(family, socket.SOCK_DGRAM))
        client.connect((host, front.getsockname()[1]))
        return front, client

    front, client = in_namespace(make)
    backend = sockets.bind(socket.AF_UNIX)
    forward.to(front, backend)
    exchange(client, backend, b"hello")  # a connected client takes answers from there only


def test_forward_client_that_asks_two_addresses_has_two_sessions(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.bind(address="0.0.0.0"), sockets.bind()
    forward.to(front, backend)
    client = sockets.client(front)
    port = front.getsockname()[1]
    for host in ("127.0.0.1", "127.0.0.2"):
        client.sendto(host.encode(), (host, port))
    seen = dict(backend.recvfrom(100) for _ in range(2))
    for word, peer in seen.items():
        backend.sendto(word, peer)
        answer, source = client.recvfrom(100)
        assert (answer, source) == (word, (word.decode(), port))


def test_forward_refused_by_the_backend_is_counted_and_not_the_end(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.bind(), sockets.listen(), sockets.bind()
    name = backend.getsockname()
    forward.config(f'[route.dns]\nto = "{target(backend)}"\n', dns=front, metrics=metrics)
    client = sockets.connect(front)
    exchange(client, backend, b"first")
    backend.close()
    refused = ("dropped_datagrams_total", "dns", "backend-refused")

    def is_counted() -> bool:
        client.send(b"nobody")
        return pages.scrape(metrics).get(refused, 0) > 0

    eventually(is_counted, "a refusal")
    backend = sockets.bind(address=name)
    client.send(b"again")
    while backend.recv(100) != b"again":
        pass
    assert pages.scrape(metrics)["connections", "dns"] == 1


def test_forward_unix_backend_that_comes_back_gets_a_new_session(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.bind(), sockets.bind(socket.AF_UNIX)
    path = backend.getsockname()
    forward.to(front, backend)
    client = sockets.connect(front)
    exchange(client, backend, b"first")
    backend.close()
    Path(path).unlink()
    client.send(b"lost")
    backend = sockets.bind(socket.AF_UNIX, path)
    backend.settimeout(0.2)

    def arrives() -> bool:
        client.send(b"again")
        try:
            return backend.recv(100) == b"again"
        except TimeoutError:
            return False

    eventually(arrives, "a datagram at the new backend")


def test_forward_sessions_end_when_nothing_moves(forward: Forwarding, sockets: Sockets) -> None:
    front, metrics, backend = sockets.bind(), sockets.listen(), sockets.bind()
    text = f'[route.dns]\nto = "{target(backend)}"\nidle-timeout = 0.3\n'
    forwarder = forward.config(text, dns=front, metrics=metrics)
    before = forwarder.descriptors
    for _ in range(5):
        exchange(sockets.connect(front), backend, b"hello")
    eventually(lambda: pages.scrape(metrics)["connections_total", "dns"] == 5, "the count")
    eventually(lambda: pages.scrape(metrics)["connections", "dns"] == 0, "sessions to end")
    eventually(lambda: forwarder.descriptors == before, "their sockets to be closed")


def test_forward_sessions_have_a_cap(forward: Forwarding, sockets: Sockets) -> None:
    front, metrics, backend = sockets.bind(), sockets.listen(), sockets.bind()
    text = f'[route.dns]\nto = "{target(backend)}"\nmax-connections = 2\n'
    forward.config(text, dns=front, metrics=metrics)
    clients = [sockets.connect(front) for _ in range(3)]
    for client in clients[:2]:
        exchange(client, backend, b"hello")
    clients[2].send(b"one too many")
    full = ("dropped_datagrams_total", "dns", "session-limit")
    eventually(lambda: pages.scrape(metrics).get(full) == 1, "it to be dropped")
    exchange(clients[0], backend, b"still there")
    assert_silent(backend)


def test_forward_denied_datagrams_are_dropped(forward: Forwarding, sockets: Sockets) -> None:
    front, metrics, backend = sockets.bind(), sockets.listen(), sockets.bind()
    text = f'[route.dns]\nto = "{target(backend)}"\ndeny = ["127.0.0.9"]\n'
    forward.config(text, dns=front, metrics=metrics)
    client = sockets.connect(front, source=("127.0.0.9", 0))
    client.send(b"hello")
    denied = ("dropped_datagrams_total", "dns", "denied")
    eventually(lambda: pages.scrape(metrics).get(denied) == 1, "it to be dropped")
    assert_silent(backend)


def test_forward_datagrams_wait_for_a_backend_that_starts_late(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, path = sockets.bind(), sockets.path()
    forward.to(front, f"unix-dgram:{path}", options=["--connect-retry", "20"])
    client = sockets.connect(front)
    for word in (b"one", b"two"):
        client.send(word)
    backend = sockets.bind(socket.AF_UNIX, path)
    assert [backend.recv(10), backend.recv(10)] == [b"one", b"two"]


def test_forward_datagram_routes_refuse_what_is_for_streams(
    forward: Forwarding, sockets: Sockets
) -> None:
    line = forward.refuse('[route.dns]\nto = "tcp:h:1"\n', dns=sockets.bind())
    assert "a dgram a dgram's" in line
    text = '[route.dns]\nto = "udp:h:1"\naccept-proxy-from = "10.0.0.1"\n'
    assert "for streams" in forward.refuse(text, dns=sockets.bind())


def test_forward_descriptors_that_clients_send_are_not_kept(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.bind(socket.AF_UNIX), sockets.bind(socket.AF_UNIX)
    forwarder = forward.to(front, backend)
    client = sockets.connect(front)
    exchange(client, backend, b"hello")
    before = forwarder.descriptors
    for _ in range(10):
        socket.send_fds(client, [b"take these"], [backend.fileno()] * 10)
        backend.recv(100)
    exchange(client, backend, b"still the same")
    assert forwarder.descriptors == before


def test_forward_time_stamps_that_a_unit_asks_for_make_no_new_clients(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.bind(), sockets.bind()
    front.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)  # Timestamping=ns
    forward.to(front, backend)
    client = sockets.connect(front)
    assert len({exchange(client, backend, b"hello") for _ in range(5)}) == 1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_forward_socket_that_somebody_shuts_down_is_left_alone_and_told(
    forward: Forwarding, sockets: Sockets, family: int
) -> None:
    fronts = {"a": sockets.bind(family), "b": sockets.bind(family)}
    backend = sockets.bind()
    forwarder = forward.config(f'[route."*"]\nto = "{target(backend)}"\n', **fronts)
    with contextlib.suppress(OSError):  # ENOTCONN from UDP, which shuts it down nevertheless
        fronts["a"].shutdown(socket.SHUT_RDWR)
    eventually(lambda: "shut down by somebody who holds it too" in forwarder.stderr, "a line")
    forwarder.assert_sleeps()
    exchange(sockets.connect(fronts["b"]), backend, b"hello")
    with contextlib.suppress(OSError):
        fronts["b"].shutdown(socket.SHUT_RDWR)
    assert forwarder.wait() == 0


# -- a unix backend that sees other abstract names ------------------------------------------


@pytest.fixture
def apart(sockets: Sockets, in_namespace: InNamespace) -> socket.socket:
    """A backend in a network of its own, as it is to a forwarder in a container."""
    return in_namespace(lambda: sockets.bind(socket.AF_UNIX))


def test_forward_unix_backend_of_another_network_answers_in_a_folder(
    forward: Forwarding, sockets: Sockets, apart: socket.socket, short_path: Path
) -> None:
    front, folder = sockets.bind(), short_path / "answers"
    folder.mkdir()
    forwarder = forward.config(
        f'[route.web]\nto = "{target(apart)}"\nidle-timeout = 1\nanswers-in = "{folder}"\n',
        web=front,
    )
    client = sockets.connect(front)
    seen = {exchange(client, apart, pattern(size)) for size in (1, 1000, 60_000)}
    assert len(seen) == 1
    assert len(list(folder.iterdir())) == 1
    eventually(lambda: not list(folder.iterdir()), "the end of the session")
    exchange(client, apart, b"again")
    assert forwarder.stop() == 0
    assert not list(folder.iterdir())


def test_forward_unix_backend_of_another_network_cannot_answer_an_abstract_name(
    forward: Forwarding, sockets: Sockets, apart: socket.socket
) -> None:
    front = sockets.bind()
    forward.to(front, apart)
    sockets.connect(front).send(b"?")
    _, peer = apart.recvfrom(10)
    with pytest.raises(ConnectionRefusedError):
        apart.sendto(b"!", peer)


def test_forward_folder_for_answers_that_is_not_there_is_told_and_counted(
    forward: Forwarding, sockets: Sockets, short_path: Path
) -> None:
    front, backend, metrics = sockets.bind(), sockets.bind(socket.AF_UNIX), sockets.listen()
    folder = short_path / "missing"
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\nanswers-in = "{folder}"\n',
        web=front, metrics=metrics,
    )  # fmt: skip
    client = sockets.connect(front)
    for number in (1, 2, 3):
        client.send(b"?")
        pages.until(metrics, {("connections_ended_total", "web", "no-address-for-answers"): number})
    [line] = forwarder.stderr.splitlines()
    assert f"no socket in {folder}: No such file or directory" in line
    assert pages.scrape(metrics)["connections", "web"] == 0
